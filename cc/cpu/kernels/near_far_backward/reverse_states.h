// Reverse states: what queries give to their far keys. R = sum of f dout and r = the same sum of
// f delta, with f = 2^(a + reference - lse), relative to a reference of each feature that is at most
// the anchor of every state that these queries read. So f is at most 1, and so is
// p = 2^(b - reference) of each key that they all see. They are merged as states are, towards the
// smaller reference: a SummaryPartial holds them with anchor = -reference, and -inf where no query
// reads the feature.
#pragma once
#include "cpu/kernels/near_far_backward/gradient.h"

PERFORMER_ISA_BEGIN

// to[m] = the anchor of a reverse state that is relative to the given anchors of a state.
template <class Acc>
void MirrorAnchors(const Strides& strides, const Acc* anchor, Acc* to) {
  for (int64_t m = 0; m < strides.m_pad; ++m)
    to[m] = anchor[m] == -kInf<Acc> ? -kInf<Acc> : -anchor[m];
}

// Adds a chunk of queries, whose weights f and rows y are at hand.
template <class Acc>
void AddToReverseState(NearFarGradient<Acc>& gradient, const QueryRows& rows, const Acc* delta,
                       const SummaryPartial<Acc>& to) {
  const QueryLogits<Acc>& s = gradient.queries;
  const Strides& strides = gradient.strides;
  MatMul<true>(s.Far(0), 1, s.stride, gradient.y, strides.e_pad, rows.n, to.sum, strides.e_pad,
               strides.m, strides.e_pad);
  for (int64_t r = 0; r < rows.n; ++r)
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>)
      Store(to.mass + m, Load(to.mass + m) + delta[r] * Load(s.Far(r) + m));
}

// to = the gradient of a state as reverse state, relative to its anchors.
template <class Acc>
void StartReverseState(const NearFarGradient<Acc>& gradient, const SummaryPartial<Acc>& state,
                       const SummaryPartial<Acc>& to) {
  const Strides& strides = gradient.strides;
  const LoadedState<Acc> grad(gradient.params.grad_state, gradient.dims, gradient.range.sequence,
                              gradient.range.head);
  ClearState(strides, to);
  for (int64_t m = 0; m < strides.m; ++m) {
    if (state.anchor[m] == -kInf<Acc>) continue;
    const Acc inverse = Inverse(state.mass[m]);
    Acc r = -grad.log_mass[m] * inverse;
    for (int64_t e = 0; e < strides.e; ++e) {
      const Acc x = grad.mean[m * strides.e + e] * inverse;
      to.sum[m * strides.e_pad + e] = x;
      r += x * (state.sum[m * strides.e_pad + e] * inverse);
    }
    to.mass[m] = r;
    to.anchor[m] = -state.anchor[m];
  }
}

// The gradient of the initial state, which every query and the final state see. Its means are less
// the centre, too.
template <class Acc>
void StoreInitialGradient(const NearFarGradient<Acc>& gradient,
                          const SummaryPartial<Acc>& reverse) {
  const Strides& strides = gradient.strides;
  const LoadedState<Acc> initial = gradient.Initial();
  for (int64_t m = 0; m < strides.m; ++m) {
    if (initial.log_mass[m] == -kInf<Acc> || reverse.anchor[m] == -kInf<Acc>) continue;
    const Acc p = Exp2(static_cast<Acc>(initial.Log2Mass(m)) + reverse.anchor[m]);
    Acc* mean = gradient.partial.mean + m * strides.e_pad;
    Acc sum = -reverse.mass[m];
    for (int64_t e = 0; e < strides.e; ++e) {
      sum += reverse.sum[m * strides.e_pad + e] *
             (initial.mean[m * strides.e + e] - gradient.centre[e]);
      mean[e] = p * reverse.sum[m * strides.e_pad + e];
    }
    gradient.partial.log_mass[m] = p * sum;
  }
}

PERFORMER_ISA_END
