// CPU OpKernels: the driver of the CPU kernels on TensorFlow's own thread pool.
#include "cpu/run.h"
#include "tf/call_op.h"

namespace performer {
namespace {

struct CpuDevice {
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

#define PERFORMER_REGISTER(name, op, type, state)             \
  REGISTER_KERNEL_BUILDER(Name(name)                          \
                              .Device(tensorflow::DEVICE_CPU) \
                              .TypeConstraint<type>("T")      \
                              .TypeConstraint<state>("U"),    \
                          CallOp<op, CpuDevice>)
#define PERFORMER_REGISTER_ALL(name, op)                     \
  PERFORMER_REGISTER(name, op, float, float);                \
  PERFORMER_REGISTER(name, op, tensorflow::bfloat16, float); \
  PERFORMER_REGISTER(name, op, Eigen::half, float);          \
  PERFORMER_REGISTER(name, op, double, double)

PERFORMER_REGISTER_ALL("Performer>Summarize", Op::kSummarize);
PERFORMER_REGISTER_ALL("Performer>Read", Op::kRead);
PERFORMER_REGISTER_ALL("Performer>Causal", Op::kCausal);
PERFORMER_REGISTER_ALL("Performer>SummarizeGrad", Op::kSummarizeGrad);
PERFORMER_REGISTER_ALL("Performer>ReadGrad", Op::kReadGrad);
PERFORMER_REGISTER_ALL("Performer>CausalGrad", Op::kCausalGrad);

}  // namespace
}  // namespace performer
