#include "cpu/run.h"

#include "cpu/dispatch.h"
#include "cpu/driver/backward.h"
#include "cpu/driver/forward.h"
#include "cpu/floating_point.h"

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
  const auto parallel_for = [&threads](int64_t count, int64_t cost,
                                       const std::function<void(int64_t, int64_t)>& body) {
    threads.parallel_for(count, cost, [&body](int64_t begin, int64_t end) {
      const StandardArithmetic standard;
      body(begin, end);
    });
  };
  const Threads with_standard_arithmetic = {threads.count, parallel_for};
  const StandardArithmetic standard;  // for what this thread does between the loops
  return call.dtype == DType::kFloat64 ? RunTyped<double>(op, call, with_standard_arithmetic, isa)
                                       : RunTyped<float>(op, call, with_standard_arithmetic, isa);
}

}  // namespace cpu
}  // namespace performer
