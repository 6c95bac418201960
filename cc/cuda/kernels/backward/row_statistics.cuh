// What the gradient of Read needs of each query row besides the features:
//
//   row_max = max_m (a + log_mass)      log_sum = log2 sum_m exp(a + log_mass - row_max)
//   delta   = sum_m softmax_m (mean . grad_out) = grad_out . out
//
// row_max and log_sum would lose the smaller one in a sum. The means are less an origin
// (backward/value_origin.cuh), and so is delta.
//
// delta is taken from the features, not from the rounded output, which would be the largest part of
// the error in bfloat16.
//
// Grid: (row tiles of all sequences, query heads). The kernel is forward/read.cuh with mean as the
// columns of a second product, g = grad_out mean^T.
#pragma once
#include "cuda/device/row_pipeline.cuh"
#include "cuda/kernels/backward/common.cuh"

namespace performer {
namespace cuda {

template <class T>
struct RowStatisticsParams : StateReadParams<T> {
  RowsOf<const T> grad_out;  // [B L, H, E]
  // [B L, H] each; log_sum: nullptr unless kKeepsLogSum<T>. row_max: in units of root, -inf where a row
  // sees no key. peak: max_m |g|.
  float *row_max = nullptr, *log_sum = nullptr, *delta = nullptr, *peak = nullptr;
};

template <class T, int W>
struct RowStatisticsLayout {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kStages = W * sizeof(T) <= 256 ? 2 : 1;
  static constexpr int kTileBytes = kTile * W * static_cast<int>(sizeof(T));
  static constexpr int kRowBytes = kRows * W * static_cast<int>(sizeof(T));
  static constexpr int kGradOut = kRowBytes;
  static constexpr int kProjection = 2 * kRowBytes;
  static constexpr int kMean = kProjection + kStages * kTileBytes;
  static constexpr int kBias = kMean + kStages * kTileBytes;
  static constexpr int kBytes = kBias + 2 * kTile * 4;
  static_assert(kBytes <= MaxSharedBytes(W, kWarps));
};

template <class T, int W>
__global__ void __launch_bounds__(128, 2) RowStatisticsKernel(RowStatisticsParams<T> p) {
  using L = RowStatisticsLayout<T, W>;
  PERFORMER_SHARED_MEMORY(shared);
  T* const queries = reinterpret_cast<T*>(shared);                      // [kRows][W]
  T* const grad_out = reinterpret_cast<T*>(shared + L::kGradOut);       // [kRows][W]
  T* const projection = reinterpret_cast<T*>(shared + L::kProjection);  // [kStages] tiles
  T* const mean = reinterpret_cast<T*>(shared + L::kMean);              // [kStages] tiles
  float* const bias = reinterpret_cast<float*>(shared + L::kBias);      // [2][kTile]
  const int tid = threadIdx.x;
  const WorkTile work = GetWorkTile(p.work, blockIdx.x);
  const int64_t head = blockIdx.y, heads = p.query.heads, group = head / (heads / p.groups);
  const int64_t state = (p.state_count == 1 ? 0 : work.sequence) * p.groups + group;
  const T* w =
      p.projection.At(QueryHeadIndex(p.projection.heads, head, heads, group), p.features_pad, W);
  const T* means = p.mean + state * p.features_pad * W;
  const float* feature_bias =
      p.feature_bias + QueryHeadIndex(p.feature_bias_heads, head, heads, group) * p.features;
  const int64_t row0 = work.first_row + work.begin;
  const int rows_here = static_cast<int>(work.end - work.begin);
  const bool linear = p.map.linear();
  const float unit = p.map.unit();

  const auto issue = [&](int first, int buffer) {
    const int tile = L::kStages == 2 ? buffer * kTile * W : 0;
    CopyOperand<T, W, kTile, L::kThreads>(projection + tile, w + first * W, kTile, tid);
    CopyOperand<T, W, kTile, L::kThreads>(mean + tile, means + first * W, kTile, tid);
    CpAsyncCommit();
    if (tid < kTile) {
      const int m = first + tid;
      bias[buffer * kTile + tid] =
          m < p.features
              ? (p.log_mass[state * p.features + m] + feature_bias[m]) * p.map.inverse_root
              : -kInfinity;
    }
  };
  const auto valid = [&](int row) { return row < rows_here; };
  CopyRows<T, W, L::kRows, L::kThreads>(queries, p.query.Row(row0, head), 0, p.query, tid, valid);
  CopyRows<T, W, L::kRows, L::kThreads>(grad_out, p.grad_out.Row(row0, head), 0, p.grad_out, tid,
                                        valid);
  if (L::kStages == 2) issue(0, 0);
  float row_max[2] = {-kInfinity, -kInfinity}, sum[2] = {}, weighted[2] = {}, peak[2] = {};
  const int features = static_cast<int>(p.features_pad);
#pragma unroll 1
  for (int first = 0; first < features; first += kTile) {
    const int buffer = first / kTile & 1, lane = Opaque(tid % 32), t = lane % 4;
    const int r0 = tid / 32 * 16;
    if constexpr (L::kStages == 1) {
      __syncthreads();  // nobody reads the last tile any more
      issue(first, buffer);
    }
    CpAsyncWait<0>();
    __syncthreads();  // the tile is complete, and nobody reads the other buffer any more
    if (L::kStages == 2 && first + kTile < features) issue(first + kTile, buffer ^ 1);
    const int tile = L::kStages == 2 ? buffer * kTile * W : 0;
    const float* const column_bias = bias + buffer * kTile;
    float x[8][4], y[8][4];
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // In float32 it is added last, as the query gradient does: the same bits.
        x[n][i] = kIs16Bit<T> && linear ? column_bias[n * 8 + 2 * t + (i & 1)] : 0.f;
        y[n][i] = 0.f;
      }
#pragma unroll
    for (int s = 0; s < W / 16; ++s) {
      uint32_t a[kFragment<T>], c[kFragment<T>];
      LoadA<T, W>(a, queries, r0, s * 16, lane);
      LoadA<T, W>(c, grad_out, r0, s * 16, lane);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t b[kFragment<T>];
        LoadB<T, W>(b, projection + tile, n * 16, s * 16, lane);
        Mma<T>(x[2 * n], x[2 * n + 1], a, b);
        LoadB<T, W>(b, mean + tile, n * 16, s * 16, lane);
        Mma<T>(y[2 * n], y[2 * n + 1], c, b);
      }
    }
    if (!linear) {
      MapLogits(x, p.map, column_bias, t);
    } else if constexpr (!kIs16Bit<T>) {
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[n][i] += column_bias[n * 8 + 2 * t + (i & 1)];
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float next = row_max[e];
#pragma unroll
      for (int n = 0; n < 8; ++n) next = fmaxf(next, fmaxf(x[n][2 * e], x[n][2 * e + 1]));
      next = QuadMax(next);
      const float base = ZeroIfNone(next), factor = Exp2((row_max[e] - base) * unit);
      row_max[e] = next;
      sum[e] *= factor;
      weighted[e] *= factor;
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float f = Exp2((x[n][2 * e + c] - base) * unit), g = y[n][2 * e + c];
          sum[e] += f;
          weighted[e] += f * g;
          peak[e] = fmaxf(peak[e], fabsf(g));
        }
    }
  }

  const int lane = tid % 32;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const float total = QuadSum(sum[e]), all = QuadSum(weighted[e]), largest = QuadMax(peak[e]);
    const int row = tid / 32 * 16 + lane / 4 + 8 * e;
    if (row >= rows_here || lane % 4 != 0) continue;
    const int64_t at = (row0 + row) * heads + head;
    StoreStatistics<T>(row_max[e], total, unit, at, p.row_max, p.log_sum);
    p.delta[at] = total == 0.f ? 0.f : all / total;
    p.peak[at] = largest;
  }
}

}  // namespace cuda
}  // namespace performer
