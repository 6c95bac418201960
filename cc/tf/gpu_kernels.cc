// The OpKernels for GPUs: the CUDA kernels on TensorFlow's stream, with workspace from its
// allocator. No CUDA header is included. float64 has no GPU kernel, so TensorFlow places it on the
// CPU.
#ifdef PERFORMER_HAVE_CUDA
#include "cuda/run.h"
#include "tf/call_op.h"
#include "tf/registration.h"
#include "xla/stream_executor/stream.h"

namespace performer {
namespace {

struct GpuDevice {
  static constexpr bool kReplacesState = false;

  static absl::Status Check(Op, const Call& call) {
    return ToTensorFlow(cuda::Supports(call.dtype, call.dims));
  }

  static absl::Status Run(tensorflow::OpKernelContext* context, Op op, const Call& call) {
    const auto* device_context = context->op_device_context();
    if (device_context == nullptr || device_context->stream() == nullptr)
      return absl::InternalError("TensorFlow gave a GPU kernel no stream");
    // TensorFlow reuses GPU memory in the order of the stream. So the workspace may be freed when
    // Compute returns, while the kernels that use it are still queued.
    std::vector<tensorflow::Tensor> workspace;
    cuda::Device device;
    device.stream = device_context->stream()->platform_specific_handle().stream;
    device.allocate = [&](size_t bytes) -> void* {
      tensorflow::Tensor block;
      const tensorflow::TensorShape shape({static_cast<int64_t>(bytes)});
      if (!context->allocate_temp(tensorflow::DT_INT8, shape, &block).ok()) return nullptr;
      workspace.push_back(block);
      return block.flat<int8_t>().data();
    };
    return ToTensorFlow(cuda::Run(op, call, device));
  }
};

// The last of an operator's inputs in host memory; offsets are in that of all. (An input may be named
// twice.)
constexpr const char* LastHostInput(Op op) { return IsNearFar(op) ? "start" : "offsets"; }

#define PERFORMER_REGISTER_TYPE(op, type)                            \
  REGISTER_KERNEL_BUILDER(Name("Performer>" #op)                     \
                              .Device(tensorflow::DEVICE_GPU)        \
                              .TypeConstraint<type>("T")             \
                              .TypeConstraint<float>("U")            \
                              .HostMemory("offsets")                 \
                              .HostMemory(LastHostInput(Op::k##op)), \
                          CallOp<Op::k##op, GpuDevice>);
#define PERFORMER_REGISTER(op)                      \
  PERFORMER_REGISTER_TYPE(op, float)                \
  PERFORMER_REGISTER_TYPE(op, tensorflow::bfloat16) \
  PERFORMER_REGISTER_TYPE(op, Eigen::half)
[[maybe_unused]] const bool registered = [] {
  if (IsRegistered(tensorflow::DEVICE_GPU)) return false;
  PERFORMER_FOR_EACH_OP(PERFORMER_REGISTER)
  return true;
}();

}  // namespace
}  // namespace performer
#endif
