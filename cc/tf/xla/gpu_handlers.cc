// The handlers of XLA's custom calls on an NVIDIA GPU: the CUDA kernels on XLA's stream, with
// workspace from its allocator. No CUDA header is included.
#ifdef PERFORMER_HAVE_CUDA
#include "cuda/devices.h"
#include "cuda/run.h"
#include "tf/xla/handler.h"

struct CUstream_st;

namespace performer {
namespace {

// TakeOffsets (core/params.h) where offsets and start lie on the GPU. The host needs them to divide
// the work, so such a call waits for the stream.
Status FetchOffsets(Op op, CUstream_st* stream, Call* call) {
  if (IsNearFar(op)) {
    const void* const start = call->inputs[OffsetsIndex(op) + 1];  // which follows the offsets
    PERFORMER_RETURN_IF_ERROR(cuda::CopyToHost(start, sizeof(int64_t), stream, &call->start));
    PERFORMER_RETURN_IF_ERROR(ValidateStart(call->start, call->attributes.packed));
  }
  if (!call->attributes.packed) return Status();
  call->offsets.resize(call->dims.sequences + 1);
  PERFORMER_RETURN_IF_ERROR(cuda::CopyToHost(call->inputs[OffsetsIndex(op)],
                                             call->offsets.size() * sizeof(int64_t), stream,
                                             call->offsets.data()));
  return ExplainOtherCount(op, *call, CheckOffsets(op, *call));
}

template <Op op>
ffi::Error RunOnGpu(CUstream_st* stream, ffi::ScratchAllocator scratch, ffi::Dictionary attributes,
                    ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  const auto run = [&]() -> Status {
    Call call;
    PERFORMER_RETURN_IF_ERROR(MakeCall(op, attributes, arguments, results, &call));
    PERFORMER_RETURN_IF_ERROR(cuda::Supports(call.dtype, call.dims));
    PERFORMER_RETURN_IF_ERROR(FetchOffsets(op, stream, &call));
    // XLA reuses memory in the order of the stream. So the workspace may be freed on return, while
    // the kernels that use it are still queued.
    const auto allocate = [&](size_t bytes) {
      return scratch.Allocate(bytes, cuda::kWorkspaceAlignment).value_or(nullptr);
    };
    return cuda::Run(op, call, {stream, allocate});
  };
  return ToXla(run());
}

template <Op op>
XLA_FFI_Error* Handler(XLA_FFI_CallFrame* frame) {
  static const auto* const handler =
      WithArguments(
          ffi::Ffi::Bind().Ctx<ffi::PlatformStream<CUstream_st*>>().Ctx<ffi::ScratchAllocator>())
          .To(RunOnGpu<op>)
          .release();
  return handler->Call(frame);
}

// The handlers are not registered as fit for command buffers (CUDA graphs), which cannot hold the
// wait for the offsets of packed sequences, nor that for the start of near-and-far attention.
[[maybe_unused]] const bool registered = [] {
#define PERFORMER_REGISTER(op) RegisterHandler(Op::k##op, "CUDA", Handler<Op::k##op>);
  PERFORMER_FOR_EACH_OP(PERFORMER_REGISTER)
#undef PERFORMER_REGISTER
  return true;
}();

}  // namespace
}  // namespace performer
#endif
