// The kernels of one instruction set (PERFORMER_ISA) and one type of sums (PERFORMER_ACC): compiled
// once for each pair.
#include "cpu/kernels.h"

#include "cpu/causal.h"
#include "cpu/causal_grad.h"
#include "cpu/read.h"
#include "cpu/step.h"
#include "cpu/summarize.h"

PERFORMER_ISA_BEGIN

namespace {

template <class Acc, Vec<Acc> (*kFunction)(Vec<Acc>)>
void Elementwise(const Acc* x, int64_t n, Acc* y) {
  for (int64_t i = 0; i < n; i += kLanes<Acc>) Store(y + i, kFunction(Load(x + i)));
}

template <class Acc>
void Finish(const Widths& w, SummaryPartial<Acc> partial, Acc* log_mass, Acc* mean) {
  WriteState(w, partial.anchor, partial.mass, partial.sum, log_mass, mean);
}

}  // namespace

const Kernels<PERFORMER_ACC>& KernelsFor(PERFORMER_ACC) {
  using Acc = PERFORMER_ACC;
  static constexpr Kernels<Acc> kKernels = {PackProjection<Acc>,
                                            Summarize<Acc>,
                                            MergeSummaries<Acc>,
                                            Finish<Acc>,
                                            Read<Acc>,
                                            Causal<Acc>,
                                            CausalKeys<Acc>,
                                            CausalQueries<Acc>,
                                            Step<Acc>,
                                            SummarizeGrad<Acc>,
                                            ReadGrad<Acc>,
                                            CausalGrad<Acc>,
                                            Elementwise<Acc, Exp2>,
                                            Elementwise<Acc, Log2>};
  return kKernels;
}

PERFORMER_ISA_END
