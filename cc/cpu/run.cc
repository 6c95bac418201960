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
  using Forward = ForwardDriver<Acc>;
  using Backward = BackwardDriver<Acc>;
  const auto run = [&](const auto& params, auto method, auto make) {
    auto driver = make(params);
    return (driver.*method)(params);
  };
  const auto forward = [&](const Common& common) { return Forward(common, *kernels, threads); };
  const auto backward = [&](const Common& common) { return Backward(common, *kernels, threads); };
  switch (op) {
    case Op::kSummarize:
      return run(MakeSummarizeParams(call), &Forward::Summarize, forward);
    case Op::kRead:
      return run(MakeReadParams(call), &Forward::Read, forward);
    case Op::kCausal:
      return run(MakeCausalParams(call), &Forward::Causal, forward);
    case Op::kSummarizeGrad:
      return run(MakeSummarizeGradParams(call), &Backward::SummarizeGrad, backward);
    case Op::kReadGrad:
      return run(MakeReadGradParams(call), &Backward::ReadGrad, backward);
    case Op::kCausalGrad:
      return run(MakeCausalGradParams(call), &Backward::CausalGrad, backward);
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
