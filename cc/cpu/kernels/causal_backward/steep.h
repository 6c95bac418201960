// What the gradient does otherwise in a steep sub-chunk (key_chain.h). With a and b the log-features
// of a query and of a key, anchor and sums those before the sub-chunk, and j <= i:
//   E[i][j] = 2^(b[j] + a[i] - shift_i)     w[i] = 2^(anchor + a[i] - shift_i)
//   u[i] = w mass + sum_j E[i][j]           G[i] = w (dout sum^T) + sum_j E[i][j] (dout_i . v_j)
//   den = sum_m u      delta = sum_m G / den      da = (G - delta u) / den
// where G and delta are less dout_i . v_j of the key j that weighs most, unless the state weighs
// more: the differences of large values are exact where one key outweighs all others by far.
// and on the way back, with E and w divided by den, and R, r relative to the anchors after the
// sub-chunk:
//   db_j = p (v R^T - r) + sum_i E[i][j] (v_j . dout_i - delta_i)
//   dv_j = p R + sum_i (sum_m E[i][j]) dout_i
// Then R and r are made relative to the anchors before it, and w^T dout and w^T delta are added.
// Powers below 2^kLeastExponent count as 0, and pairs that have no others cost nothing.
#pragma once
#include "cpu/kernels/causal_backward/gradient.h"
#include "cpu/simd/triangle.h"

PERFORMER_ISA_BEGIN

// to[m] = the largest of anchor[m] and of the log-features of n keys.
template <class Acc>
void RaisedAnchors(const Strides& strides, const Acc* anchor, const Acc* b, int64_t n, Acc* to) {
  for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
    Vec<Acc> highest = Load(anchor + m);
    for (int64_t j = 0; j < n; ++j) highest = Max(Load(b + j * strides.m_stride + m), highest);
    Store(to + m, highest);
  }
}

// The anchors before the sub-chunk, with padding that weighs nothing.
template <class Acc>
PERFORMER_INLINE Vec<Acc> AnchorsWithPadding(const Acc* anchor) {
  return Load(anchor) == kInf<Acc> ? Splat(-kInf<Acc>) : Load(anchor);
}

// The largest of a + b; shows whether one of them is NaN.
template <class Acc>
struct HighestSum {
  Acc value;
  bool is_nan;

  PERFORMER_INLINE HighestSum(const Acc* a, const Acc* b, const Strides& strides) {
    Vec<Acc> highest = Splat(-kInf<Acc>), differences = {};
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
      const Vec<Acc> x = Load(a + m) + Load(b + m);
      const Vec<Acc> one = Splat(Acc(1)), zero = {};
      differences += x != x ? one : zero;
      highest = Max(x, highest);
    }
    value = ReduceMax<Acc>(highest);
    is_nan = ReduceAdd<Acc>(differences) > 0;
  }
  // Whether a power of 2 relative to `reference` may count.
  PERFORMER_INLINE bool Counts(Acc reference) const {
    return is_nan || !(value < reference + kLeastExponent<Acc>);
  }
};

// a of n queries, in f.
template <class Acc, class In>
void SteepLogFeatures(CausalGradient<Acc, In>& gradient, const QueryHead<Acc>& head, int64_t n,
                      Acc* slope) {
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  LogFeatures<Acc>(gradient.map, s.queries.q, n, head.projection.panels, strides, s.queries.f,
                   slope, &gradient.prefetcher);
  SetFeatureBias(head.feature_bias, strides, s.queries.bias);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
      Acc* a = s.queries.f + r * strides.m_stride + m;
      Store(a, Load(a) + Load(s.queries.bias + m));
    }
}

template <class Acc>
PERFORMER_INLINE double DotInDouble(const Acc* a, const Acc* b, int64_t n) {
  Vec<double> sum = {};
  for (int64_t i = 0; i < n; i += kLanes<double>) {
    Vec<double> x, y;
    for (int l = 0; l < kLanes<double>; ++l) x[l] = a[i + l], y[l] = b[i + l];
    sum += x * y;
  }
  return ReduceAdd<double>(sum);
}

// g = da of row r, from g = dout sum^T; what is kept of the row. values: of the sub-chunk.
template <class Acc, class In>
void SteepRowGradient(CausalGradient<Acc, In>& gradient, const Acc* keys, const Acc* values,
                      int64_t r, Acc* feature_bias, Acc* shift_of_row, Acc* inverse_of_row,
                      double* delta) {
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  const Acc* a = s.queries.f + r * strides.m_stride;
  Acc *g = s.g + r * strides.m_stride, *u = s.cumulative + r * strides.m_stride;
  Vec<Acc> highest = Splat(-kInf<Acc>);
  for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>)
    highest = Max(Load(a + m) + AnchorsWithPadding(s.anchor + m), highest);
  Acc shift = ReduceMax<Acc>(highest), of_key[CausalGradient<Acc, In>::C];
  int64_t first_key = -1;  // the one that weighs most, -1: the state
  for (int64_t j = 0; j <= r; ++j) {
    const HighestSum<Acc> sum(a, keys + j * strides.m_stride, strides);
    of_key[j] = sum.is_nan ? kInf<Acc> : sum.value;
    if (sum.value > shift) shift = sum.value, first_key = j;
  }
  if (shift == -kInf<Acc>) shift = 0;
  const auto pair_of = [&](int64_t j) {
    return DotInDouble(s.y + r * strides.e_pad, values + j * strides.e_pad, strides.e_pad);
  };
  const double reference = first_key < 0 ? 0 : pair_of(first_key);
  const Acc less = static_cast<Acc>(reference);
  int64_t live[CausalGradient<Acc, In>::C], count = 0;
  Acc pair[CausalGradient<Acc, In>::C];  // dout . v_j of the live ones, less the reference
  for (int64_t j = 0; j <= r; ++j)
    if (!(of_key[j] < shift + kLeastExponent<Acc>)) {
      pair[count] = static_cast<Acc>(pair_of(j) - reference);
      live[count++] = j;
    }

  Vec<Acc> den = {}, sum = {};
  for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
    const Vec<Acc> x = Load(a + m);
    const Vec<Acc> w = Exp2Normal<Acc>(AnchorsWithPadding(s.anchor + m) + x - shift);
    Vec<Acc> all = w * Load(s.mass + m), weighted = w * (Load(g + m) - less * Load(s.mass + m));
    for (int64_t k = 0; k < count; ++k) {
      const Acc* b = keys + live[k] * strides.m_stride + m;
      const Vec<Acc> y = Exp2Normal<Acc>(Load(b) + x - shift);
      all += y;
      weighted += y * pair[k];
    }
    Store(u + m, all);
    Store(g + m, weighted);
    den += all;
    sum += weighted;
  }
  const Acc total = ReduceAdd<Acc>(den), inverse = Inverse(total);
  const Acc less_delta = ReduceAdd<Acc>(sum) * inverse;
  *delta = reference + static_cast<double>(less_delta);
  *shift_of_row = shift;
  *inverse_of_row = inverse;
  for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
    const Vec<Acc> da = (Load(g + m) - less_delta * Load(u + m)) * inverse;
    Store(g + m, da);
    Store(feature_bias + m, Load(feature_bias + m) + da);
  }
}

// Queries of head i of the group, already loaded: g = da, summed into the feature bias's gradient;
// keeps shift, inverse and delta of each row.
template <class Acc, class In>
void SteepLogitGradient(CausalGradient<Acc, In>& gradient, const GradSubChunk& sub_chunk,
                        int64_t i) {
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  const int64_t n = sub_chunk.rows;
  SteepLogFeatures(gradient, gradient.SteepHead(i), n, s.query_slope);
  MatMulPanels(s.y, strides.e_pad, n, s.sum_panels, strides.e_pad, strides, s.g,
               &gradient.prefetcher);
  Acc* shift = gradient.OfHead(gradient.shift, i, sub_chunk.row);
  Acc* inverse = gradient.OfHead(gradient.inverse, i, sub_chunk.row);
  double* delta = gradient.OfHead(gradient.delta, i, sub_chunk.row);
  for (int64_t r = 0; r < n; ++r)
    SteepRowGradient(gradient, s.key_log_features + sub_chunk.chunk_begin * strides.m_stride,
                     gradient.Values(sub_chunk), r,
                     gradient.partial.feature_bias + i * strides.m_pad, shift + r, inverse + r,
                     delta + r);
}

// Pairs of a key and a query of the sub-chunk, whose a is in f: adds to db and to dv.
template <class Acc, class In>
void AddSteepPairGradients(CausalGradient<Acc, In>& gradient, int64_t n, const Acc* shift,
                           const Acc* inverse, const double* delta) {
  constexpr int64_t kPairStride = CausalGradient<Acc, In>::kPairStride;
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  for (int64_t j = 0; j < n; ++j) {
    const Acc* b = s.steep_keys + j * strides.m_stride;
    Acc *db = s.grad_key_logits + j * strides.m_stride, *scores = s.scores + j * kPairStride;
    for (int64_t i = j; i < n; ++i) {
      const Acc* a = s.queries.f + i * strides.m_stride;
      scores[i] = 0;
      if (s.keys.skip[j] || !HighestSum<Acc>(a, b, strides).Counts(shift[i])) continue;
      const double dot =
          DotInDouble(s.keys.v + j * strides.e_pad, s.y + i * strides.e_pad, strides.e_pad);
      const Acc pair = static_cast<Acc>(dot - delta[i]), scale = inverse[i];
      Vec<Acc> sum = {};
      for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
        const Vec<Acc> y = Exp2Normal<Acc>(Load(b + m) + Load(a + m) - shift[i]) * scale;
        Store(db + m, Load(db + m) + y * pair);
        sum += y;
      }
      scores[i] = ReduceAdd<Acc>(sum);
    }
  }
  AddReverseCausalProduct(s.scores, kPairStride, s.y, strides.e_pad, s.dv, strides.e_pad, n,
                          strides.e_pad);
}

// a in f becomes w, normalised: the weights of the state before the sub-chunk.
template <class Acc, class In>
void SteepStateWeights(CausalGradient<Acc, In>& gradient, int64_t n, const Acc* shift,
                       const Acc* inverse) {
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  for (int64_t r = 0; r < n; ++r)
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
      Acc* f = s.queries.f + r * strides.m_stride + m;
      const Vec<Acc> x = AnchorsWithPadding(s.anchor + m) + Load(f) - shift[r];
      Store(f, Exp2Normal<Acc>(x) * inverse[r]);
    }
}

PERFORMER_ISA_END
