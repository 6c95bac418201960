// Forward scan of the gradient of causal attention; the formulas are in causal_backward.h.
#pragma once
#include "cpu/kernels/causal_backward/causal_backward.h"
#include "cpu/simd/triangle.h"

PERFORMER_ISA_BEGIN

// Column m of the panels, the prefix sum of feature m, times keep.
template <class Acc>
void CausalGradient<Acc>::ScaleForwardState(int64_t m, Acc keep) {
  Acc* column = s_.panels + m / kPanel * kPanel * strides_.e_pad + m % kPanel;
  for (int64_t e = 0; e < strides_.e_pad; ++e) column[e * kPanel] *= keep;
  s_.mass[m] *= keep;
}

template <class Acc>
bool CausalGradient<Acc>::SaveAnchors() {
  Acc* set = anchors_.Append(strides_.m_pad);
  if (set == nullptr) return false;
  for (int64_t m = 0; m < strides_.m_pad; ++m) set[m] = s_.anchor[m];
  return true;
}

template <class Acc>
int64_t CausalGradient<Acc>::AnchorSets() const {
  return anchors_.size() / strides_.m_pad;
}

template <class Acc>
void CausalGradient<Acc>::StartForwardState() {
  initial_.CopyMean(strides_, s_.initial_mean);
  TransposeToPanels(s_.initial_mean, strides_.m, strides_.e_pad, strides_.e_pad, s_.panels);
  for (int64_t m = 0; m < strides_.m_pad; ++m) {
    s_.anchor[m] = m < strides_.m ? initial_.log_mass[m] * kLog2e<Acc>
                                  : kInf<Acc>;  // the padding weighs nothing
    s_.mass[m] = m < strides_.m && s_.anchor[m] != -kInf<Acc> ? 1 : 0;
  }
}

template <class Acc>
bool CausalGradient<Acc>::ForwardScan() {
  StartForwardState();
  if (!SaveAnchors()) return false;
  for (int64_t row = range_.begin; row < range_.end; row += C) {
    const int64_t n = range_.end - row < C ? range_.end - row : C;
    LoadKeys(row, n);
    for (int64_t begin = 0, end; begin < n; begin = end) {
      end = begin + 1;
      if (s_.keys.skip[begin] && Empty()) {
        ZeroRows(row + begin);
        continue;
      }
      if (!s_.keys.skip[begin] && Exceeds(begin)) {
        RaiseForwardState(s_.b + begin * strides_.m_stride);
        if (!SaveAnchors()) return false;
      }
      while (end < n && !Exceeds(end)) ++end;
      GradSubChunk* sub_chunk = sub_chunks_.Append(1);
      if (sub_chunk == nullptr) return false;
      *sub_chunk = {row + begin, begin, end - begin, AnchorSets() - 1};
      ApplyFeatureMap(*sub_chunk);
      for (int64_t i = 0; i < GroupSize(dims_); ++i) ForwardQueries(*sub_chunk, i);
      if (UpdateForwardState(*sub_chunk) && !SaveAnchors()) return false;
    }
  }
  return true;
}

// A row that sees no key.
template <class Acc>
void CausalGradient<Acc>::ZeroRows(int64_t row) {
  for (int64_t d = 0; d < strides_.d_pad; ++d) s_.dq[d] = s_.dk[d] = 0;
  for (int64_t e = 0; e < strides_.e_pad; ++e) s_.dv[e] = 0;
  for (int64_t i = 0; i < GroupSize(dims_); ++i)
    StoreRows<Acc>(
        {params_.grad_queries.query, params_.dtype, dims_.heads, FirstHead() + i, strides_.d}, row,
        1, s_.dq, strides_.d_pad);
  StoreRows(key_rows_.key, row, 1, s_.dk, strides_.d_pad);
  StoreRows(key_rows_.value, row, 1, s_.dv, strides_.e_pad);
  key_rows_.bias[row] = 0;
}

template <class Acc>
void CausalGradient<Acc>::RaiseForwardState(const Acc* b) {
  for (int64_t m = 0; m < strides_.m; ++m) {
    if (!(b[m] > s_.anchor[m])) continue;
    ScaleForwardState(m, Exp2(s_.anchor[m] - b[m]));
    s_.anchor[m] = b[m];
  }
}

template <class Acc>
void CausalGradient<Acc>::ForwardQueries(const GradSubChunk& sub_chunk, int64_t i) {
  const QueryHead<Acc> head = Head(i);
  const int64_t n = sub_chunk.rows;
  LoadQueries(sub_chunk, i);
  SetBias(s_.anchor, 1.0, head.feature_bias, strides_, s_.bias);
  QueryLogFeatures(map_, {s_.q, strides_.d_pad, 1}, n, head.projection, strides_, s_.bias, s_.f,
                   s_.query_slope, s_.row_max, &prefetcher_);
  QueryFeatures<false, Acc>(n, strides_, s_.bias, nullptr, s_.row_max, s_.f, s_.shift, s_.den);
  for (int64_t r = 0; r < n; ++r)
    s_.den[r] = Dot(s_.f + r * strides_.m_stride, s_.cum + r * strides_.m_stride, strides_.m_pad);
  ScaleRows(n, strides_.e_pad, s_.den, s_.y);
  FeatureGradient(sub_chunk);
  LogitGradient(sub_chunk, i);
  ChainSlope(map_, n, strides_, s_.query_slope, s_.g);
  MatMul<false>(s_.g, strides_.m_stride, 1, head.projection.rows.at, strides_.d_pad, strides_.m,
                s_.dq, strides_.d_pad, n, strides_.d_pad);
  StoreRows<Acc>(
      {params_.grad_queries.query, params_.dtype, dims_.heads, FirstHead() + i, strides_.d},
      sub_chunk.row, n, s_.dq, strides_.d_pad);
  MatMul<true>(s_.g, 1, strides_.m_stride, s_.q, strides_.d_pad, n,
               partial_.query_projection + i * strides_.m * strides_.d_pad, strides_.d_pad,
               strides_.m, strides_.d_pad);
}

// g = y sum^T + tril(y v^T) key_features.
template <class Acc>
void CausalGradient<Acc>::FeatureGradient(const GradSubChunk& sub_chunk) {
  const int64_t n = sub_chunk.rows;
  TransposeRows(SubChunkValues(sub_chunk), strides_.e_pad, n, strides_.e_pad, s_.transposed);
  LowerProduct(s_.y, strides_.e_pad, s_.transposed, C, strides_.e_pad, n, 0, s_.pair, kPairStride);
  for (int64_t m = 0; m < strides_.m_pad; m += kPanel) {
    const int64_t cols = strides_.m_pad - m < kPanel ? strides_.m_pad - m : kPanel;
    CausalProduct(s_.y, strides_.e_pad, s_.panels + m * strides_.e_pad, kPanel, strides_.e_pad,
                  s_.pair, kPairStride, s_.key_features + m, strides_.m_stride, s_.g + m,
                  strides_.m_stride, n, cols);
  }
}

// g = da; keeps lse and delta of each row.
template <class Acc>
void CausalGradient<Acc>::LogitGradient(const GradSubChunk& sub_chunk, int64_t i) {
  Acc* lse = OfHead(lse_, i, sub_chunk.row);
  Acc* delta = OfHead(delta_, i, sub_chunk.row);
  Acc* feature_bias = partial_.feature_bias + i * strides_.m_pad;
  for (int64_t r = 0; r < sub_chunk.rows; ++r) {
    const Acc *f = s_.f + r * strides_.m_stride, *cum = s_.cum + r * strides_.m_stride;
    Acc* g = s_.g + r * strides_.m_stride;
    delta[r] = Dot(f, g, strides_.m_pad);
    lse[r] = s_.den[r] == 0 ? kInf<Acc> : s_.shift[r] + Log2(s_.den[r]);
    const Acc scaled = delta[r] * Inverse(s_.den[r]);
    for (int64_t m = 0; m < strides_.m_pad; m += kLanes<Acc>) {
      const Vec<Acc> x = Load(f + m) * (Load(g + m) - scaled * Load(cum + m));
      Store(g + m, x);
      Store(feature_bias + m, Load(feature_bias + m) + x);
    }
  }
}

// Adds the keys of the sub-chunk to the prefix; true if an anchor changed.
template <class Acc>
bool CausalGradient<Acc>::UpdateForwardState(const GradSubChunk& sub_chunk) {
  for (int64_t m = 0; m < strides_.m_pad; m += kPanel) {
    const int64_t cols = strides_.m_pad - m < kPanel ? strides_.m_pad - m : kPanel;
    MatMul<true>(SubChunkValues(sub_chunk), 1, strides_.e_pad, s_.key_features + m,
                 strides_.m_stride, sub_chunk.rows, s_.panels + m * strides_.e_pad, kPanel,
                 strides_.e_pad, cols);
  }
  bool rescaled = false;
  const Acc* mass = s_.cum + (sub_chunk.rows - 1) * strides_.m_stride;
  for (int64_t m = 0; m < strides_.m; ++m) {
    s_.mass[m] = mass[m];
    if (!(s_.mass[m] > kRescaleThreshold<Acc>)) continue;
    const Acc raised = s_.anchor[m] + Log2(s_.mass[m]);
    ScaleForwardState(m, Exp2(s_.anchor[m] - raised));
    s_.anchor[m] = raised;
    rescaled = true;
  }
  return rescaled;
}

PERFORMER_ISA_END
