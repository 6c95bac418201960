#include "cpu/run.h"

#include "cpu/dispatch.h"
#include "cpu/driver/backward.h"
#include "cpu/driver/forward.h"

namespace performer {
namespace cpu {
namespace {

template <class Acc>
Status RunTyped(Op op, const Call& call, const Threads& threads, const std::string& isa) {
  const Kernels<Acc>* kernels = nullptr;
  PERFORMER_RETURN_IF_ERROR(FindKernels(isa, &kernels));
  const auto forward = [&](const auto& params) {
    return ForwardDriver<Acc>(params, *kernels, threads).Run(params);
  };
  const auto backward = [&](const auto& params) {
    return BackwardDriver<Acc>(params, *kernels, threads).Run(params);
  };
  switch (op) {
    case Op::kSummarize:
      return forward(MakeSummarizeParams(call));
    case Op::kRead:
      return forward(MakeReadParams(call));
    case Op::kCausal:
      return forward(MakeCausalParams(call));
    case Op::kNearFar:
      return forward(MakeNearFarParams(call));
    case Op::kSummarizeGrad:
      return backward(MakeSummarizeGradParams(call));
    case Op::kReadGrad:
      return backward(MakeReadGradParams(call));
    case Op::kCausalGrad:
      return backward(MakeCausalGradParams(call));
    case Op::kNearFarGrad:
      return backward(MakeNearFarGradParams(call));
  }
  return Status::InvalidArgument("unknown operator");
}

}  // namespace

Status Run(Op op, const Call& call, const Threads& threads, const std::string& isa) {
  return call.dtype == DType::kFloat64 ? RunTyped<double>(op, call, threads, isa)
                                       : RunTyped<float>(op, call, threads, isa);
}

}  // namespace cpu
}  // namespace performer
