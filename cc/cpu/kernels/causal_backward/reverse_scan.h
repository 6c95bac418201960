// Reverse scan of the gradient of causal attention: dk, dv, the key projection's gradient and that
// of the initial state. The formulas are in causal_backward.h.
#pragma once
#include "cpu/kernels/causal_backward/steep.h"

PERFORMER_ISA_BEGIN

// The gradient of the final state as reverse state, relative to the last anchors.
template <class Acc, class In>
void StartReverseState(CausalGradient<Acc, In>& gradient) {
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  const LoadedState<Acc> grad(gradient.params.grad_state, gradient.dims, gradient.range.sequence,
                              gradient.range.head);
  for (int64_t m = 0; m < strides.m; ++m) {
    const Acc inverse = Inverse(s.mass[m]);
    const Acc* sum = s.sum_panels + m / kPanel * kPanel * strides.e_pad + m % kPanel;
    Acc r = -grad.log_mass[m] * inverse;
    for (int64_t e = 0; e < strides.e_pad; ++e) {
      const bool given = e < strides.e && inverse != 0;
      const Acc x = given ? grad.mean[m * strides.e + e] * inverse : Acc(0);
      s.reverse_sum[m * strides.e_pad + e] = x;
      if (given) r += x * (sum[e * kPanel] * inverse);
    }
    s.reverse_mass[m] = inverse == 0 ? Acc(0) : r;
  }
  for (int64_t m = strides.m; m < strides.m_pad; ++m) s.reverse_mass[m] = 0;
}

// Makes the reverse state relative to other, earlier anchors [m_pad].
template <class Acc, class In>
void RescaleReverseState(CausalGradient<Acc, In>& gradient, const Acc* anchors) {
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  for (int64_t m = 0; m < strides.m; ++m) {
    if (anchors[m] == s.anchor[m]) continue;
    const Acc keep = Exp2(anchors[m] - s.anchor[m]);
    Acc* row = s.reverse_sum + m * strides.e_pad;
    for (int64_t e = 0; e < strides.e_pad; e += kLanes<Acc>)
      Store(row + e, WithoutDenormals<Acc>(Load(row + e) * keep));
    s.reverse_mass[m] *= keep;
    s.anchor[m] = anchors[m];
  }
}

// Makes the reverse state that of values that are less an earlier centre.
template <class Acc, class In>
void MoveCentre(CausalGradient<Acc, In>& gradient, int64_t centre) {
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  if (gradient.centre_in_force == centre || strides.e_pad == 0) return;
  const Acc* to = &gradient.centres[centre * strides.e_pad];
  for (int64_t e = 0; e < strides.e_pad; ++e) s.centre[e] -= to[e];
  for (int64_t m = 0; m < strides.m; ++m)
    s.reverse_mass[m] += Dot(s.reverse_sum + m * strides.e_pad, s.centre, strides.e_pad);
  Copy(to, strides.e_pad, s.centre);
  gradient.centre_in_force = centre;
}

// y = 0 in rows that see no key.
template <class Acc, class In>
void ZeroRowsWithoutKeys(CausalGradient<Acc, In>& gradient, int64_t n, const Acc* inverse) {
  const int64_t width = gradient.strides.e_pad;
  for (int64_t r = 0; r < n; ++r)
    if (inverse[r] == 0)
      for (int64_t e = 0; e < width; ++e) gradient.s.y[r * width + e] = 0;
}

// f of the queries of one head, normalised; y is 0 in rows that see no key.
template <class Acc, class In>
void NormalisedQueryFeatures(CausalGradient<Acc, In>& gradient, const QueryHead<Acc, In>& head,
                             int64_t n, const Acc* shift, const Acc* inverse) {
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  gradient.LogFeaturesOf(s.queries.q, n, head.projection, s.queries.f, nullptr);
  SetBias(s.anchor, 1.0, head.feature_bias, strides, s.queries.bias);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
      Acc* f = s.queries.f + r * strides.m_stride + m;
      Store(f, Exp2(Load(f) + Load(s.queries.bias + m) - shift[r]) * inverse[r]);
    }
  }
  ZeroRowsWithoutKeys(gradient, n, inverse);
}

// Pairs of a key and a query of the sub-chunk: adds triu(v dout^T - delta) f to the keys' gradient,
// and triu(p f^T) dout to dv.
template <class Acc, class In>
void AddPairGradients(CausalGradient<Acc, In>& gradient, int64_t n, const double* delta) {
  using Gradient = CausalGradient<Acc, In>;
  constexpr int64_t C = Gradient::C, kPairStride = Gradient::kPairStride;
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  Gradient::TransposeRows(s.y, strides.e_pad, n, strides.e_pad, s.transposed);
  for (int64_t r = 0; r < n; ++r) s.padded_delta[r] = static_cast<Acc>(delta[r]);
  for (int64_t r = n; r < C; ++r) s.padded_delta[r] = 0;
  UpperProduct(s.keys.v, strides.e_pad, s.transposed, C, strides.e_pad, n, s.grad_scores,
               kPairStride);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t c = 0; c < C; c += kLanes<Acc>) {
      Acc* pair = s.grad_scores + r * kPairStride + c;
      Store(pair, Load(pair) - Load(s.padded_delta + c));
    }
  const Left<In> p = gradient.AsLeft(s.key_features, n, strides.m_pad, strides.m_stride);
  UpperProduct(p.data, p.row_stride, gradient.TransposeQueryFeatures(n), C,
               Operands<Acc, In>::Depth(strides.m), n, s.scores, kPairStride);
  AddReverseCausalProduct(s.grad_scores, kPairStride, s.queries.f, strides.m_stride,
                          s.grad_key_logits, strides.m_stride, n, strides.m_pad);
  AddReverseCausalProduct(s.scores, kPairStride, s.y, strides.e_pad, s.dv, strides.e_pad, n,
                          strides.e_pad);
}

// The queries of head i of the group: adds to the keys' gradient and dv, then to the reverse state.
template <class Acc, class In>
void ReverseQueries(CausalGradient<Acc, In>& gradient, const GradSubChunk& sub_chunk, int64_t i) {
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  const int64_t n = sub_chunk.rows;
  const Acc* shift = gradient.OfHead(gradient.shift, i, sub_chunk.row);
  const Acc* inverse = gradient.OfHead(gradient.inverse, i, sub_chunk.row);
  const double* delta = gradient.OfHead(gradient.delta, i, sub_chunk.row);
  gradient.LoadQueries(sub_chunk, i);
  if (sub_chunk.steep) {
    SteepLogFeatures(gradient, gradient.SteepHead(i), n, static_cast<Acc*>(nullptr));
    ZeroRowsWithoutKeys(gradient, n, inverse);
    AddSteepPairGradients(gradient, n, shift, inverse, delta);
    SteepStateWeights(gradient, n, shift, inverse);
  } else {
    NormalisedQueryFeatures(gradient, gradient.Head(i), n, shift, inverse);
    AddPairGradients(gradient, n, delta);
  }
  Product<true>(gradient.AsLeftTransposed(s.queries.f, n, strides.m_pad, strides.m_stride),
                gradient.AsRight(s.y, n, strides.e_pad, strides.e_pad), n, s.reverse_sum,
                strides.e_pad, strides.m, strides.e_pad);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>)
      Store(s.reverse_mass + m,
            Load(s.reverse_mass + m) +
                static_cast<Acc>(delta[r]) *
                    Operands<Acc, In>::Rounded(Load(s.queries.f + r * strides.m_stride + m)));
}

template <class Acc>
void RowSums(int64_t n, const Strides& strides, const Acc* rows, Acc* row_sum) {
  for (int64_t j = 0; j < n; ++j, rows += strides.m_stride) {
    Vec<Acc> sum = {};
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) sum += Load(rows + m);
    row_sum[j] = ReduceAdd<Acc>(sum);
  }
}

template <class Acc, class In>
void ReverseSubChunk(CausalGradient<Acc, In>& gradient, const GradSubChunk& given) {
  auto& s = gradient.s;
  const auto& map = gradient.map;
  const Strides& strides = gradient.strides;
  // Only the rows of the sub-chunk are loaded: it begins at row 0 of the buffers.
  const GradSubChunk sub_chunk = {given.row,    0,          given.rows, given.anchors,
                                  given.centre, given.steep};
  const int64_t n = sub_chunk.rows;
  const Acc* anchors = &gradient.anchors[given.anchors * strides.m_pad];
  if (!given.steep) MoveCentre(gradient, given.centre);
  gradient.LoadKeys(sub_chunk.row, n);
  if (given.steep) {
    Copy(s.key_log_features, n * strides.m_stride, s.steep_keys);
    RaisedAnchors(strides, anchors, s.key_log_features, n, s.raised);
  }
  RescaleReverseState(gradient, given.steep ? s.raised : anchors);
  gradient.ComputeKeyFeatures(sub_chunk);
  TransposeToPanels(s.reverse_sum, strides.m, strides.e_pad, strides.e_pad, s.reverse_panels);
  for (int64_t m = 0; m < strides.m_pad; ++m) s.reverse_mass_before[m] = s.reverse_mass[m];
  Product<false>(gradient.AsLeft(s.key_features, n, strides.m_pad, strides.m_stride),
                 gradient.AsRight(s.reverse_sum, strides.m, strides.e_pad, strides.e_pad),
                 strides.m, s.dv, strides.e_pad, n, strides.e_pad);
  MatMulPanels(s.keys.v, strides.e_pad, n, s.reverse_panels, strides.e_pad, strides,
               s.grad_key_logits, &gradient.prefetcher);
  const auto key_logit_gradient = [&] {
    KeyLogitGradient(n, strides, s.keys.skip, s.reverse_mass_before, s.key_features,
                     s.grad_key_logits, s.row_sum);
  };
  if (given.steep) {
    key_logit_gradient();
    RescaleReverseState(gradient, anchors);
    MoveCentre(gradient, given.centre);
    gradient.LoadValues(sub_chunk.row, n);
  }
  for (int64_t i = 0; i < GroupSize(gradient.dims); ++i) ReverseQueries(gradient, sub_chunk, i);
  if (given.steep) {
    RowSums(n, strides, s.grad_key_logits, s.row_sum);
  } else {
    key_logit_gradient();
  }
  ChainSlope(map, n, strides, s.key_slope, s.grad_key_logits);
  gradient.LogitProducts(s.grad_key_logits, n, gradient.key_projection, s.keys.k, s.dk,
                         gradient.partial.key_projection);
  StoreKeyGradients(gradient.key_rows, map, strides, s.keys, s.row_sum, sub_chunk.row, n, s.dk,
                    s.dv);
}

// The reverse state before the first row: the gradient of the initial state.
template <class Acc, class In>
void StoreInitialGradient(CausalGradient<Acc, In>& gradient) {
  const auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  for (int64_t m = 0; m < strides.m; ++m) {
    if (s.anchor[m] == -kInf<Acc>) continue;  // an empty initial state: the gradient is 0
    Acc* mean = gradient.partial.mean + m * strides.e_pad;
    Acc sum = -s.reverse_mass[m];
    for (int64_t e = 0; e < strides.e_pad; ++e) {
      mean[e] = s.reverse_sum[m * strides.e_pad + e];
      sum += mean[e] * s.initial_mean[m * strides.e_pad + e];
    }
    gradient.partial.log_mass[m] = sum;
  }
}

template <class Acc, class In>
void ReverseScan(CausalGradient<Acc, In>& gradient) {
  gradient.prefetcher = Prefetcher(true);
  StartReverseState(gradient);
  gradient.centre_in_force = gradient.last_centre;
  for (int64_t p = gradient.sub_chunks.size() - 1; p >= 0; --p) {
    const GradSubChunk sub_chunk = gradient.sub_chunks[p];
    ReverseSubChunk(gradient, sub_chunk);
  }
  RescaleReverseState(gradient, &gradient.anchors[0]);
  StoreInitialGradient(gradient);
}

PERFORMER_ISA_END
