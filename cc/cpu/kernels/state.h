// The state of one sequence and key/value head: its form in tensors (log_mass, mean), and its form
// in kernels, sums relative to 2^anchor.
#pragma once
#include "cpu/memory/layout.h"
#include "cpu/simd/math.h"

PERFORMER_ISA_BEGIN

// A state in tensors: natural logarithms, rows without padding.
template <class Acc>
struct LoadedState {
  const Acc* log_mass;  // [m]
  const Acc* mean;      // [m][e]

  LoadedState(const State& state, const Dims& dims, int64_t sequence, int64_t group) {
    const int64_t at = ((state.count == 1 ? 0 : sequence) * dims.groups + group) * dims.features;
    log_mass = static_cast<const Acc*>(state.log_mass) + at;
    mean = static_cast<const Acc*>(state.mean) + at * dims.value_dim;
  }
  // to [m][e_pad] = the means with padding, 0 where the feature has seen no key.
  void CopyMean(const Strides& strides, Acc* to) const {
    for (int64_t m = 0; m < strides.m; ++m) {
      const Acc* from = mean + m * strides.e;
      Acc* row = to + m * strides.e_pad;
      const int64_t given = log_mass[m] == -kInf<Acc> ? 0 : strides.e;
      for (int64_t e = 0; e < given; ++e) row[e] = from[e];
      for (int64_t e = given; e < strides.e_pad; ++e) row[e] = 0;
    }
  }
};

// log_mass[m] and mean[m][e] of sums [m][e_pad] and masses relative to 2^anchor; -inf and 0 where
// the mass is 0.
template <class Acc>
void WriteState(const Strides& strides, const Acc* anchor, const Acc* mass, const Acc* sum,
                Acc* log_mass, Acc* mean) {
  for (int64_t m = 0; m < strides.m; ++m) {
    const bool nothing = mass[m] == 0;
    const double log2_mass =
        static_cast<double>(anchor[m]) + __builtin_log2(static_cast<double>(mass[m]));
    log_mass[m] = nothing ? -kInf<Acc> : static_cast<Acc>(kLn2Double * log2_mass);
    const Acc inverse = nothing ? Acc(0) : 1 / mass[m];
    for (int64_t e = 0; e < strides.e; ++e)
      mean[m * strides.e + e] = nothing ? Acc(0) : sum[m * strides.e_pad + e] * inverse;
  }
}

// to = the merged states x and y, relative to the larger anchor; it may be one of them.
template <class Acc>
void MergedSummary(const Strides& strides, const SummaryPartial<Acc>& x,
                   const SummaryPartial<Acc>& y, const SummaryPartial<Acc>& to) {
  for (int64_t m0 = 0; m0 < strides.m; m0 += kLanes<Acc>) {
    const Vec<Acc> a = Load(x.anchor + m0), b = Load(y.anchor + m0), zero = {};
    const Vec<Acc> anchor = Max(a, b), base = anchor == -kInf<Acc> ? zero : anchor;
    const Vec<Acc> keep = Exp2(a - base), add = Exp2(b - base);
    Store(to.anchor + m0, anchor);
    Store(to.mass + m0, keep * Load(x.mass + m0) + add * Load(y.mass + m0));
    for (int64_t m = m0; m < m0 + kLanes<Acc> && m < strides.m; ++m)
      for (int64_t e = m * strides.e_pad; e < (m + 1) * strides.e_pad; e += kLanes<Acc>)
        Store(to.sum + e, keep[m - m0] * Load(x.sum + e) + add[m - m0] * Load(y.sum + e));
  }
}

// Merges `more` into `into`.
template <class Acc>
void MergeSummaries(const Strides& strides, SummaryPartial<Acc> into, SummaryPartial<Acc> more) {
  MergedSummary(strides, into, more, into);
}

PERFORMER_ISA_END
