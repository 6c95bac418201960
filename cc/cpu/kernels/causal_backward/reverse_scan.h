// Reverse scan of the gradient of causal attention; the formulas are in causal_backward.h.
#pragma once
#include "cpu/kernels/causal_backward/causal_backward.h"
#include "cpu/simd/triangle.h"

PERFORMER_ISA_BEGIN

// The gradient of the final state as reverse state, relative to the last anchors.
template <class Acc>
void CausalGradient<Acc>::StartReverseState() {
  const LoadedState<Acc> grad(params_.grad_state, dims_, range_.sequence, range_.head);
  for (int64_t m = 0; m < strides_.m; ++m) {
    const Acc inverse = Inverse(s_.mass[m]);
    const Acc* sum = s_.panels + m / kPanel * kPanel * strides_.e_pad + m % kPanel;
    Acc r = -grad.log_mass[m] * inverse;
    for (int64_t e = 0; e < strides_.e_pad; ++e) {
      const Acc x =
          e < strides_.e && inverse != 0 ? grad.mean[m * strides_.e + e] * inverse : Acc(0);
      s_.reverse_state[m * strides_.e_pad + e] = x;
      if (e < strides_.e && inverse != 0) r += x * (sum[e * kPanel] * inverse);
    }
    s_.mass[m] = inverse == 0 ? Acc(0) : r;
  }
  for (int64_t m = strides_.m; m < strides_.m_pad; ++m) s_.mass[m] = 0;
}

// Makes the reverse state relative to other, earlier anchors.
template <class Acc>
void CausalGradient<Acc>::RescaleReverseState(const Acc* anchors) {
  for (int64_t m = 0; m < strides_.m; ++m) {
    if (anchors[m] == s_.anchor[m]) continue;
    const Acc keep = Exp2(anchors[m] - s_.anchor[m]);
    for (int64_t e = 0; e < strides_.e_pad; ++e) s_.reverse_state[m * strides_.e_pad + e] *= keep;
    s_.mass[m] *= keep;
    s_.anchor[m] = anchors[m];
  }
}

template <class Acc>
void CausalGradient<Acc>::ReverseScan() {
  prefetcher_ = Prefetcher(true);
  StartReverseState();
  for (int64_t p = sub_chunks_.size() - 1; p >= 0; --p) {
    const GradSubChunk sub_chunk = sub_chunks_[p];
    RescaleReverseState(&anchors_[sub_chunk.anchors * strides_.m_pad]);
    ReverseSubChunk(sub_chunk);
  }
  RescaleReverseState(&anchors_[0]);
  for (int64_t m = 0; m < strides_.m; ++m) {
    if (s_.anchor[m] == -kInf<Acc>) continue;  // an empty initial state: gradient 0
    Acc* mean = partial_.mean + m * strides_.e_pad;
    Acc sum = -s_.mass[m];
    for (int64_t e = 0; e < strides_.e_pad; ++e) {
      mean[e] = s_.reverse_state[m * strides_.e_pad + e];
      sum += mean[e] * s_.initial_mean[m * strides_.e_pad + e];
    }
    partial_.log_mass[m] = sum;
  }
}

template <class Acc>
void CausalGradient<Acc>::ReverseSubChunk(const GradSubChunk& given) {
  const GradSubChunk sub_chunk = {given.row, 0, given.rows,
                                  given.anchors};  // here the chunk is the sub-chunk
  const int64_t n = sub_chunk.rows;
  LoadKeys(sub_chunk.row, n);
  ApplyFeatureMap(sub_chunk);
  TransposeToPanels(s_.reverse_state, strides_.m, strides_.e_pad, strides_.e_pad, s_.panels);
  for (int64_t m = 0; m < strides_.m_pad; ++m) s_.saved[m] = s_.mass[m];
  MatMul<false>(s_.key_features, strides_.m_stride, 1, s_.reverse_state, strides_.e_pad, strides_.m,
                s_.dv, strides_.e_pad, n, strides_.e_pad);
  MatMulPanels(s_.keys.v, strides_.e_pad, n, s_.panels, strides_.e_pad, strides_, s_.b,
               &prefetcher_);  // g of the keys, in the buffer of the log-features
  for (int64_t i = 0; i < GroupSize(dims_); ++i) ReverseQueries(sub_chunk, i);
  KeyLogitGradient(n, strides_, s_.keys.skip, s_.saved, s_.key_features, s_.b, s_.row_sum);
  ChainSlope(map_, n, strides_, s_.key_slope, s_.b);
  MatMul<false>(s_.b, strides_.m_stride, 1, key_projection_.rows, strides_.d_pad, strides_.m, s_.dk,
                strides_.d_pad, n, strides_.d_pad);
  StoreKeyGradients(key_rows_, map_, strides_, s_.keys, s_.row_sum, sub_chunk.row, n, s_.dk, s_.dv);
  MatMul<true>(s_.b, 1, strides_.m_stride, s_.keys.k, strides_.d_pad, n, partial_.key_projection,
               strides_.d_pad, strides_.m, strides_.d_pad);
}

// The queries of one head: adds to the keys' g and dv, then to the reverse state.
template <class Acc>
void CausalGradient<Acc>::ReverseQueries(const GradSubChunk& sub_chunk, int64_t i) {
  const int64_t n = sub_chunk.rows;
  const QueryHead<Acc> head = Head(i);
  const Acc *lse = OfHead(lse_, i, sub_chunk.row), *delta = OfHead(delta_, i, sub_chunk.row);
  LoadQueries(sub_chunk, i);
  LogFeatures<Acc>(map_, s_.q, n, head.projection.panels, strides_, s_.f, nullptr, &prefetcher_);
  SetBias(s_.anchor, 1.0, head.feature_bias, strides_, s_.bias);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t m = 0; m < strides_.m_pad; m += kLanes<Acc>) {
      Acc* f = s_.f + r * strides_.m_stride + m;
      Store(f, Exp2(Load(f) + Load(s_.bias + m) - lse[r]));
    }
    if (lse[r] == kInf<Acc>)
      for (int64_t e = 0; e < strides_.e_pad; ++e) s_.y[r * strides_.e_pad + e] = 0;
  }
  TransposeRows(s_.y, strides_.e_pad, n, strides_.e_pad, s_.transposed);
  TransposeRows(s_.f, strides_.m_stride, n, strides_.m_pad, s_.f_transposed);
  for (int64_t r = 0; r < n; ++r) s_.shift[r] = delta[r];
  for (int64_t r = n; r < C; ++r) s_.shift[r] = 0;
  UpperProduct(s_.keys.v, strides_.e_pad, s_.transposed, C, strides_.e_pad, n, s_.pair,
               kPairStride);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t c = 0; c < C; c += kLanes<Acc>) {
      Acc* pair = s_.pair + r * kPairStride + c;
      Store(pair, Load(pair) - Load(s_.shift + c));
    }
  UpperProduct(s_.key_features, strides_.m_stride, s_.f_transposed, C, strides_.m, n, s_.weights,
               kPairStride);
  AddReverseCausalProduct(s_.pair, kPairStride, s_.f, strides_.m_stride, s_.b, strides_.m_stride, n,
                          strides_.m_pad);
  AddReverseCausalProduct(s_.weights, kPairStride, s_.y, strides_.e_pad, s_.dv, strides_.e_pad, n,
                          strides_.e_pad);
  MatMul<true>(s_.f, 1, strides_.m_stride, s_.y, strides_.e_pad, n, s_.reverse_state,
               strides_.e_pad, strides_.m, strides_.e_pad);
  for (int64_t r = 0; r < n; ++r)
    for (int64_t m = 0; m < strides_.m_pad; m += kLanes<Acc>)
      Store(s_.mass + m, Load(s_.mass + m) + delta[r] * Load(s_.f + r * strides_.m_stride + m));
}

PERFORMER_ISA_END
