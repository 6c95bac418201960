// The OpKernels for the CPU: the driver of the CPU kernels on TensorFlow's own thread pool.
#include "cpu/run.h"
#include "tf/call_op.h"
#include "tf/registration.h"

namespace performer {
namespace {

struct CpuDevice {
  static constexpr bool kReplacesState = true;
  static absl::Status Check(Op, const Call&) { return absl::OkStatus(); }

  static absl::Status Run(tensorflow::OpKernelContext* context, Op op, const Call& call) {
    auto* pool = context->device()->tensorflow_cpu_worker_threads()->workers;
    const auto parallel_for = [pool](int64_t count, int64_t cost,
                                     const std::function<void(int64_t, int64_t)>& body) {
      pool->ParallelFor(count, tsl::thread::ThreadPool::SchedulingParams::Adaptive(cost), body);
    };
    return ToTensorFlow(cpu::Run(op, call, {pool->NumThreads(), parallel_for}));
  }
};

#define PERFORMER_REGISTER_TYPE(op, type, state)              \
  REGISTER_KERNEL_BUILDER(Name("Performer>" #op)              \
                              .Device(tensorflow::DEVICE_CPU) \
                              .TypeConstraint<type>("T")      \
                              .TypeConstraint<state>("U"),    \
                          CallOp<Op::k##op, CpuDevice>);
#define PERFORMER_REGISTER(op)                             \
  PERFORMER_REGISTER_TYPE(op, float, float)                \
  PERFORMER_REGISTER_TYPE(op, tensorflow::bfloat16, float) \
  PERFORMER_REGISTER_TYPE(op, Eigen::half, float)          \
  PERFORMER_REGISTER_TYPE(op, double, double)
[[maybe_unused]] const bool registered = [] {
  if (IsRegistered(tensorflow::DEVICE_CPU)) return false;
  PERFORMER_FOR_EACH_OP(PERFORMER_REGISTER)
  return true;
}();

}  // namespace
}  // namespace performer
