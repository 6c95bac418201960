// Forward scan of the gradient of causal attention: dq, the query projection's gradient, and what
// is kept of each row. The formulas are in causal_backward.h.
#pragma once
#include "cpu/kernels/causal_backward/steep.h"

PERFORMER_ISA_BEGIN

// Rescales sum and mass of feature m, column m of the panels.
template <class Acc, class In>
void ScaleForwardState(CausalGradient<Acc, In>& gradient, int64_t m, Acc keep) {
  const Strides& strides = gradient.strides;
  Acc* column = gradient.s.sum_panels + m / kPanel * kPanel * strides.e_pad + m % kPanel;
  for (int64_t e = 0; e < strides.e_pad; ++e) {
    const Acc x = column[e * kPanel] * keep;
    column[e * kPanel] = x < kLeastNormal<Acc> && x > -kLeastNormal<Acc> ? Acc(0) : x;
  }
  gradient.s.mass[m] *= keep;
}

// Appends the anchors in force as a new set.
template <class Acc, class In>
bool SaveAnchors(CausalGradient<Acc, In>& gradient) {
  Acc* set = gradient.anchors.Append(gradient.strides.m_pad);
  if (set == nullptr) return false;
  for (int64_t m = 0; m < gradient.strides.m_pad; ++m) set[m] = gradient.s.anchor[m];
  return true;
}

// The forward state before the first row: the initial state.
template <class Acc, class In>
void StartForwardState(CausalGradient<Acc, In>& gradient) {
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  gradient.initial.CopyMean(strides, s.initial_mean);
  if (CentreOfMeans(strides, gradient.initial.log_mass, s.initial_mean, strides.e_pad, s.mass,
                    s.centre))
    gradient.centred = CausalGradient<Acc, In>::Centred::kByState;
  SubtractCentre(strides, strides.m, s.centre, s.initial_mean);
  TransposeToPanels(s.initial_mean, strides.m, strides.e_pad, strides.e_pad, s.sum_panels);
  for (int64_t m = 0; m < strides.m_pad; ++m) {
    // The padding weighs nothing.
    s.anchor[m] = m < strides.m ? static_cast<Acc>(gradient.initial.Log2Mass(m)) : kInf<Acc>;
    s.mass[m] = m < strides.m && s.anchor[m] != -kInf<Acc> ? 1 : 0;
  }
}

// Sets the centre from the state before a chunk, if there are keys in it and no state has set it.
// False if there is no memory, as in what follows.
template <class Acc, class In>
bool CentreForwardState(CausalGradient<Acc, In>& gradient) {
  using Centred = typename CausalGradient<Acc, In>::Centred;
  if (gradient.centred == Centred::kByState) return true;
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  const auto sum = [&](int64_t m, int64_t e) -> Acc& {
    return s.sum_panels[(m / kPanel * strides.e_pad + e) * kPanel + m % kPanel];
  };
  // The sums are less the centre so far, and so is their average.
  const bool any = Centre<Acc>(strides, s.mass, sum, s.dv);
  if (!any) return true;
  gradient.centred = Centred::kByState;
  for (int64_t m = 0; m < strides.m; ++m)
    for (int64_t e = 0; e < strides.e; ++e) sum(m, e) -= s.dv[e] * s.mass[m];
  for (int64_t e = 0; e < strides.e_pad; ++e) s.centre[e] += s.dv[e];
  return gradient.SaveCentre();
}

// Sets the centre to the value of the first unmasked key of a chunk that has been loaded, if there
// is none yet. Every row of the chunk that sees a key sees this one.
template <class Acc, class In>
bool CentreByFirstKey(CausalGradient<Acc, In>& gradient, int64_t n) {
  using Centred = typename CausalGradient<Acc, In>::Centred;
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  if (gradient.centred != Centred::kNot || !s.keys.any) return true;
  int64_t first = 0;
  while (s.keys.skip[first]) ++first;
  for (int64_t e = 0; e < strides.e_pad; ++e) {
    const Acc x = s.keys.v[first * strides.e_pad + e];
    s.centre[e] = x - x == 0 ? x : Acc(0);
  }
  SubtractCentre(strides, n, s.centre, s.keys.v);
  gradient.centred = Centred::kByFirstKey;
  return gradient.SaveCentre();
}

// Renews the centre after the rows of a steep sub-chunk, the last one of a chunk, whose keys have
// raised the anchors, but are not in the state yet. It becomes the average of the means with these
// keys, which may have little in common with the past.
template <class Acc, class In>
bool RenewCentre(CausalGradient<Acc, In>& gradient, const GradSubChunk& sub_chunk) {
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  const Acc* mass = s.cumulative + (sub_chunk.rows - 1) * strides.m_stride;
  Acc *more = s.dv, count = 0;
  for (int64_t m = 0; m < strides.m_pad; ++m) {
    s.inverse_mass[m] = m < strides.m ? Inverse(mass[m]) : Acc(0);
    if (s.inverse_mass[m] != 0) ++count;
  }
  for (int64_t e = 0; e < strides.e_pad; ++e) more[e] = 0;
  const auto sum = [&](int64_t m, int64_t e) -> Acc& {
    return s.sum_panels[(m / kPanel * strides.e_pad + e) * kPanel + m % kPanel];
  };
  for (int64_t m = 0; m < strides.m; ++m)
    for (int64_t e = 0; e < strides.e; ++e) more[e] += sum(m, e) * s.inverse_mass[m];
  for (int64_t j = 0; j < sub_chunk.rows; ++j) {
    const Acc weight = Dot(s.key_features + j * strides.m_stride, s.inverse_mass, strides.m_pad);
    const Acc* v = gradient.Values(sub_chunk) + j * strides.e_pad;
    for (int64_t e = 0; e < strides.e; ++e) more[e] += weight * v[e];
  }
  for (int64_t e = 0; e < strides.e; ++e) {
    more[e] *= Inverse(count);
    if (!(more[e] - more[e] == 0)) more[e] = 0;
    s.centre[e] += more[e];
    for (int64_t m = 0; m < strides.m; ++m) sum(m, e) -= more[e] * s.mass[m];
  }
  gradient.LoadValues(sub_chunk.row - sub_chunk.chunk_begin,
                      sub_chunk.chunk_begin + sub_chunk.rows);
  return gradient.SaveCentre();
}

// Whether no key has been seen yet.
template <class Acc, class In>
bool IsEmpty(const CausalGradient<Acc, In>& gradient) {
  for (int64_t m = 0; m < gradient.strides.m; ++m)
    if (gradient.s.anchor[m] != -kInf<Acc>) return false;
  return true;
}

// Whether key j of the chunk exceeds an anchor by more than kCutBits.
template <class Acc, class In>
bool Exceeds(const CausalGradient<Acc, In>& gradient, int64_t j) {
  const auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  IntVec<Acc> any = {};
  for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>)
    any |= Load(s.key_log_features + j * strides.m_stride + m) > Load(s.anchor + m) + kCutBits<Acc>;
  for (int l = 0; l < kLanes<Acc>; ++l)
    if (any[l]) return true;
  return false;
}

// Raises the anchors to all keys of a steep sub-chunk; true if one changed.
template <class Acc, class In>
bool RaiseToSubChunk(CausalGradient<Acc, In>& gradient, const GradSubChunk& sub_chunk) {
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  RaisedAnchors(strides, s.anchor, s.key_log_features + sub_chunk.chunk_begin * strides.m_stride,
                sub_chunk.rows, s.raised);
  bool changed = false;
  for (int64_t m = 0; m < strides.m; ++m) {
    if (!(s.raised[m] > s.anchor[m])) continue;
    ScaleForwardState(gradient, m, Exp2(s.anchor[m] - s.raised[m]));
    s.anchor[m] = s.raised[m];
    changed = true;
  }
  return changed;
}

// Raises the anchors to the key of row `row` of the chunk.
template <class Acc, class In>
void RaiseForwardState(CausalGradient<Acc, In>& gradient, int64_t row) {
  auto& s = gradient.s;
  const Acc* b = s.key_log_features + row * gradient.strides.m_stride;
  for (int64_t m = 0; m < gradient.strides.m; ++m) {
    if (!(b[m] > s.anchor[m])) continue;
    ScaleForwardState(gradient, m, Exp2(s.anchor[m] - b[m]));
    s.anchor[m] = b[m];
  }
}

// Gradients of a row that sees no key.
template <class Acc, class In>
void ZeroRows(CausalGradient<Acc, In>& gradient, int64_t row) {
  auto& s = gradient.s;
  const auto& params = gradient.params;
  const Dims& dims = gradient.dims;
  const Strides& strides = gradient.strides;
  for (int64_t d = 0; d < strides.d_pad; ++d) s.dq[d] = s.dk[d] = 0;
  for (int64_t e = 0; e < strides.e_pad; ++e) s.dv[e] = 0;
  for (int64_t i = 0; i < GroupSize(dims); ++i)
    StoreRows<Acc>(
        {params.grad_queries.query, params.dtype, dims.heads, gradient.FirstHead() + i, strides.d},
        row, 1, s.dq, strides.d_pad);
  StoreRows(gradient.key_rows.key, row, 1, s.dk, strides.d_pad);
  StoreRows(gradient.key_rows.value, row, 1, s.dv, strides.e_pad);
  gradient.key_rows.bias[row] = 0;
}

// g = y sum^T + tril(y v^T) p.
template <class Acc, class In>
void FeatureGradient(CausalGradient<Acc, In>& gradient, const GradSubChunk& sub_chunk) {
  using Gradient = CausalGradient<Acc, In>;
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  const int64_t n = sub_chunk.rows;
  Gradient::TransposeRows(gradient.Values(sub_chunk), strides.e_pad, n, strides.e_pad,
                          s.transposed);
  LowerProduct(s.y, strides.e_pad, s.transposed, Gradient::C, strides.e_pad, n, 0, s.grad_scores,
               Gradient::kPairStride);
  const Left<In> y = gradient.AsLeft(s.y, n, strides.e_pad, strides.e_pad);
  const In* sum = gradient.AsPanels(s.sum_panels, strides.e_pad);
  const int64_t depth = Operands<Acc, In>::Depth(strides.e_pad);
  for (int64_t m = 0; m < strides.m_pad; m += kPanel) {
    const int64_t cols = strides.m_pad - m < kPanel ? strides.m_pad - m : kPanel;
    CausalProduct(y.data, y.row_stride, sum + m * depth, kPanel, depth, s.grad_scores,
                  Gradient::kPairStride, s.key_features + m, strides.m_stride, s.g + m,
                  strides.m_stride, n, cols);
  }
}

// g = da, summed into the feature bias's gradient; keeps shift, inverse and delta of each row.
template <class Acc, class In>
void CausalLogitGradient(CausalGradient<Acc, In>& gradient, const GradSubChunk& sub_chunk,
                         int64_t i) {
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  Acc* shift = gradient.OfHead(gradient.shift, i, sub_chunk.row);
  Acc* inverse = gradient.OfHead(gradient.inverse, i, sub_chunk.row);
  double* delta = gradient.OfHead(gradient.delta, i, sub_chunk.row);
  Acc* feature_bias = gradient.partial.feature_bias + i * strides.m_pad;
  for (int64_t r = 0; r < sub_chunk.rows; ++r) {
    const Acc *f = s.queries.f + r * strides.m_stride,
              *cumulative = s.cumulative + r * strides.m_stride;
    Acc* g = s.g + r * strides.m_stride;
    const Acc sum = Dot(f, g, strides.m_pad);
    delta[r] = static_cast<double>(sum);
    shift[r] = s.queries.shift[r];
    inverse[r] = Inverse(s.queries.den[r]);
    const Acc scaled = sum * inverse[r];
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
      const Vec<Acc> da = Load(f + m) * (Load(g + m) - scaled * Load(cumulative + m));
      Store(g + m, da);
      Store(feature_bias + m, Load(feature_bias + m) + da);
    }
  }
}

// Queries of head i of the group, already loaded: g = da.
template <class Acc, class In>
void ForwardLogitGradient(CausalGradient<Acc, In>& gradient, const GradSubChunk& sub_chunk,
                          int64_t i) {
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  const QueryHead<Acc, In> head = gradient.Head(i);
  const int64_t n = sub_chunk.rows;
  SetBias(s.anchor, 1.0, head.feature_bias, strides, s.queries.bias);
  const Left<In> q = gradient.AsLeft(s.queries.q, n, strides.d_pad, strides.d_pad);
  ComputeQueryFeatures<false>(gradient.map, q, n, head.projection, strides,
                              static_cast<const Acc*>(nullptr), s.query_slope, s.queries,
                              &gradient.prefetcher);
  for (int64_t r = 0; r < n; ++r)
    s.queries.den[r] =
        Dot(s.queries.f + r * strides.m_stride, s.cumulative + r * strides.m_stride, strides.m_pad);
  ScaleRows(n, strides.e_pad, s.queries.den, s.y);
  FeatureGradient(gradient, sub_chunk);
  CausalLogitGradient(gradient, sub_chunk, i);
}

// Queries of head i of the group: dq and the query projection's gradient.
template <class Acc, class In>
void ForwardQueries(CausalGradient<Acc, In>& gradient, const GradSubChunk& sub_chunk, int64_t i) {
  auto& s = gradient.s;
  const auto& params = gradient.params;
  const auto& map = gradient.map;
  const Strides& strides = gradient.strides;
  const int64_t n = sub_chunk.rows;
  gradient.LoadQueries(sub_chunk, i);
  if (sub_chunk.steep) {
    SteepLogitGradient(gradient, sub_chunk, i);
  } else {
    ForwardLogitGradient(gradient, sub_chunk, i);
  }
  ChainSlope(map, n, strides, s.query_slope, s.g);
  gradient.LogitProducts(s.g, n, gradient.Head(i).projection, s.queries.q, s.dq,
                         gradient.partial.query_projection + i * strides.m * strides.d_pad);
  StoreRows<Acc>({params.grad_queries.query, params.dtype, gradient.dims.heads,
                  gradient.FirstHead() + i, strides.d},
                 sub_chunk.row, n, s.dq, strides.d_pad);
}

// Adds the keys of the sub-chunk to the forward state; true if an anchor changed.
template <class Acc, class In>
bool UpdateForwardState(CausalGradient<Acc, In>& gradient, const GradSubChunk& sub_chunk) {
  auto& s = gradient.s;
  const Strides& strides = gradient.strides;
  const Left<In> v = gradient.AsLeftTransposed(gradient.Values(sub_chunk), sub_chunk.rows,
                                               strides.e_pad, strides.e_pad);
  const Right<In> p =
      gradient.AsRight(s.key_features, sub_chunk.rows, strides.m_pad, strides.m_stride);
  for (int64_t m = 0; m < strides.m_pad; m += kPanel) {
    const int64_t cols = strides.m_pad - m < kPanel ? strides.m_pad - m : kPanel;
    Product<true>(v, Right<In>{p.data + m, p.stride}, sub_chunk.rows,
                  s.sum_panels + m * strides.e_pad, kPanel, strides.e_pad, cols);
  }
  bool rescaled = false;
  const Acc* mass = s.cumulative + (sub_chunk.rows - 1) * strides.m_stride;
  for (int64_t m = 0; m < strides.m; ++m) {
    s.mass[m] = mass[m];
    if (!(s.mass[m] > kRescaleThreshold<Acc>)) continue;
    const Acc raised = s.anchor[m] + Log2(s.mass[m]);
    ScaleForwardState(gradient, m, Exp2(s.anchor[m] - raised));
    s.anchor[m] = raised;
    rescaled = true;
  }
  return rescaled;
}

// False if there is no memory.
template <class Acc, class In>
bool ForwardScan(CausalGradient<Acc, In>& gradient) {
  constexpr int64_t C = CausalGradient<Acc, In>::C;
  auto& s = gradient.s;
  const WorkRange& range = gradient.range;
  StartForwardState(gradient);
  if (!SaveAnchors(gradient) || !gradient.SaveCentre()) return false;
  for (int64_t row = range.begin; row < range.end; row += C) {
    const int64_t n = range.end - row < C ? range.end - row : C;
    if (!CentreForwardState(gradient)) return false;
    gradient.LoadKeys(row, n);
    if (!CentreByFirstKey(gradient, n)) return false;
    for (int64_t begin = 0, end; begin < n; begin = end) {
      end = begin + 1;
      if (s.keys.skip[begin] && IsEmpty(gradient)) {
        ZeroRows(gradient, row + begin);
        continue;
      }
      const bool exceeds = !s.keys.skip[begin] && Exceeds(gradient, begin);
      const bool steep = (begin > 0 || exceeds) && !IsEmpty(gradient);
      if (steep) {
        end = n;
      } else if (exceeds) {
        RaiseForwardState(gradient, begin);
        if (!SaveAnchors(gradient)) return false;
      }
      while (end < n && !Exceeds(gradient, end)) ++end;
      GradSubChunk* sub_chunk = gradient.sub_chunks.Append(1);
      if (sub_chunk == nullptr) return false;
      const int64_t sets = gradient.anchors.size() / gradient.strides.m_pad;
      *sub_chunk = {row + begin, begin, end - begin, sets - 1, gradient.last_centre, steep};
      if (!steep) gradient.ComputeKeyFeatures(*sub_chunk);
      for (int64_t i = 0; i < GroupSize(gradient.dims); ++i)
        ForwardQueries(gradient, *sub_chunk, i);
      bool changed = steep && RaiseToSubChunk(gradient, *sub_chunk);
      if (steep) {
        gradient.ComputeKeyFeatures(*sub_chunk);
        if (!RenewCentre(gradient, *sub_chunk)) return false;
      }
      changed |= UpdateForwardState(gradient, *sub_chunk);
      if (changed && !SaveAnchors(gradient)) return false;
    }
  }
  return true;
}

PERFORMER_ISA_END
