// The kernels of one instruction set (PERFORMER_ISA) and one type of sums (PERFORMER_ACC). This
// file is compiled once for each pair.
#include "cpu/kernels/kernels.h"

#include <type_traits>

#include "cpu/kernels/causal/causal.h"
#include "cpu/kernels/causal_backward/causal_backward.h"
#include "cpu/kernels/decode.h"
#include "cpu/kernels/near_far/kernels.h"
#include "cpu/kernels/read.h"
#include "cpu/kernels/read_backward.h"
#include "cpu/kernels/summarize.h"
#include "cpu/kernels/summarize_backward.h"

PERFORMER_ISA_BEGIN

namespace {

template <class Acc, Vec<Acc> (*kFunction)(Vec<Acc>)>
void Elementwise(const Acc* x, int64_t n, Acc* y) {
  for (int64_t i = 0; i < n; i += kLanes<Acc>) Store(y + i, kFunction(Load(x + i)));
}

template <class Acc>
void Finish(const Strides& strides, SummaryPartial<Acc> partial, Acc* log_mass, Acc* mean) {
  WriteState(strides, partial.anchor, partial.mass, partial.sum, log_mass, mean);
}

// The products of a bfloat16 call multiply bfloat16 where the processor can.
template <class Acc>
using BFloat16Operand = std::conditional_t<kHasPairs && std::is_same_v<Acc, float>, Pair, Acc>;

template <class Acc>
void PackBidirectional(const Attributes& attributes, DType dtype, const Strides& strides,
                       const Acc* from, Acc* to) {
  if constexpr (std::is_same_v<BFloat16Operand<Acc>, Pair>)
    if (dtype == DType::kBFloat16) return Operands<Acc, Pair>::Pack(strides, from, to);
  PackProjection<Acc>(attributes, dtype, strides, from, to);
}

template <class Acc>
void PackCausal(const Attributes& attributes, DType dtype, const Strides& strides, const Acc* from,
                Acc* to) {
  if (dtype == DType::kBFloat16)
    return CausalProjection<Acc, BFloat16Operand<Acc>>::Pack(attributes, dtype, strides, from, to);
  PackProjection<Acc>(attributes, dtype, strides, from, to);
}

// kernel<Acc, In> for the type of the call.
#define PERFORMER_BY_OPERAND(kernel)                                                             \
  [](const auto& params, auto... rest) {                                                         \
    return params.dtype == DType::kBFloat16 ? kernel<Acc, BFloat16Operand<Acc>>(params, rest...) \
                                            : kernel<Acc, Acc>(params, rest...);                 \
  }

}  // namespace

const Kernels<PERFORMER_ACC>& KernelsFor(PERFORMER_ACC) {
  using Acc = PERFORMER_ACC;
  static constexpr Kernels<Acc> kKernels = {PackProjection<Acc>,
                                            PackBidirectional<Acc>,
                                            PackCausal<Acc>,
                                            PERFORMER_BY_OPERAND(Summarize),
                                            MergeSummaries<Acc>,
                                            Finish<Acc>,
                                            PERFORMER_BY_OPERAND(Read),
                                            PERFORMER_BY_OPERAND(Causal),
                                            PERFORMER_BY_OPERAND(CausalKeys),
                                            PERFORMER_BY_OPERAND(CausalQueries),
                                            RunNearFar,
                                            Decode<Acc>,
                                            PERFORMER_BY_OPERAND(SummarizeGrad),
                                            PERFORMER_BY_OPERAND(ReadGrad),
                                            PERFORMER_BY_OPERAND(CausalGrad),
                                            RunNearFarGrad,
                                            Elementwise<Acc, Exp2>,
                                            Elementwise<Acc, Log2>};
  return kKernels;
}

PERFORMER_ISA_END
