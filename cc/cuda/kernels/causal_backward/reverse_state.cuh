// The reverse state: what later rows ask of earlier keys, the counterpart of a state for gradients.
// At a boundary between rows, where log_mass is that of all keys before it:
//
//   R[m] = sum over later rows i of exp(a[i, m] + log_mass[m] - lse_i) grad_out_i
//   r[m] = the same of delta_i
//
// A key before the boundary gets exp(b - log_mass) (R . v - r) in its log weight, and exp(b -
// log_mass) R in its value. The gradient of the final state is the reverse state after the last
// row, and that before the first row is the gradient of the initial state. Every factor is <= 1.
//
// Reverse states are summed over splits and merged as states are: ReverseStateKernel gives what the
// rows of one split add, relative to the state before it, and MergeReverseStatesKernel adds these
// up from the last split to the first.
#pragma once
#include "cuda/kernels/causal_backward/common.cuh"

namespace performer {
namespace cuda {

template <class T>
struct ReverseStateParams : CausalGradientParams<T> {
  Projection<T> projection;    // of queries
  float* part_mean = nullptr;  // R [splits, H, M, E]
  float* part_mass = nullptr;  // r [splits, H, M]
};

template <class T, int W>
struct ReverseStateLayout : BackwardLayout<T, W, 4> {
  using S = BackwardLayout<T, W, 4>;
  static constexpr int kStages = 2;
  static constexpr int kQuery = S::kFeatureBytes;  // after the projection
  static constexpr int kGradOut = kQuery + kStages * S::kTileBytes;
  static constexpr int kRowMax = kGradOut + kStages * S::kTileBytes;  // float [2][kTile]
  static constexpr int kDelta = kRowMax + 2 * kTile * 4;              // likewise
  static constexpr int kLogSum = kDelta + 2 * kTile * 4;              // likewise
  static constexpr int kBytes = kLogSum + (kKeepsLogSum<T> ? 2 * kTile * 4 : 0);
  static_assert(kBytes <= S::kMaxBytes);
};

// Grid: (splits of all sequences, query heads, feature blocks). The first split of a sequence is
// left out, because only the initial state lies before it.
template <class T, int W>
__global__ void __launch_bounds__(128, 1) ReverseStateKernel(ReverseStateParams<T> p) {
  using L = ReverseStateLayout<T, W>;
  constexpr int kRowTiles = L::kRowTiles, kThreads = L::kThreads;
  PERFORMER_SHARED_MEMORY(shared);
  T* const projection = reinterpret_cast<T*>(shared);
  float* const row_max = reinterpret_cast<float*>(shared + L::kRowMax);
  float* const log_sum = reinterpret_cast<float*>(shared + L::kLogSum);
  float* const delta = reinterpret_cast<float*>(shared + L::kDelta);
  const int tid = threadIdx.x, row_feature = tid / 32 * 16 * kRowTiles;
  const WorkTile work = GetWorkTile(p.work, blockIdx.x);
  if (work.index == 0) return;
  const int64_t head = blockIdx.y, heads = p.query.heads, group = head / (heads / p.groups);
  const int64_t row0 = work.first_row + work.begin;
  const int rows = static_cast<int>(work.end - work.begin);
  const int tiles = static_cast<int>(CeilDiv(rows, kTile));
  const int first_feature = blockIdx.z * L::kFeatures, features = static_cast<int>(p.features);
  const bool linear = p.map.linear();
  const float unit = p.map.unit();

  const auto issue = [&](int tile, int buffer) {
    const int first = tile * kTile;
    const auto valid = [&](int r) { return first + r < rows; };
    CopyRows<T, W, kTile, kThreads>(reinterpret_cast<T*>(shared + L::kQuery) + buffer * kTile * W,
                                    p.query.Row(row0, head), first, p.query, tid, valid);
    CopyRows<T, W, kTile, kThreads>(reinterpret_cast<T*>(shared + L::kGradOut) + buffer * kTile * W,
                                    p.grad_out.Row(row0, head), first, p.grad_out, tid, valid);
    CpAsyncCommit();
    if (tid < kTile)
      LoadStatistics<T>(row_max, log_sum, delta, buffer * kTile + tid, p.statistics,
                        (row0 + first + tid) * heads + head, valid(tid));
  };
  {
    const T* w =
        p.projection.At(QueryHeadIndex(p.projection.heads, head, heads, group), p.features_pad, W);
    CopyOperand<T, W, L::kFeatures, kThreads>(
        projection, w + static_cast<int64_t>(first_feature) * W,
        static_cast<int>(p.features_pad) - first_feature, tid);
  }
  issue(0, 0);
  float sum[kRowTiles][W / 8][4] = {}, mass[kRowTiles][2] = {}, row_bias[kRowTiles][2];
  {
    const float* feature_bias =
        p.feature_bias + QueryHeadIndex(p.feature_bias_heads, head, heads, group) * features;
    const float* log_mass = p.before_log_mass + (blockIdx.x * p.groups + group) * features;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int feature = first_feature + row_feature + m * 16 + tid % 32 / 4 + 8 * e;
        row_bias[m][e] = feature < features
                             ? (log_mass[feature] + feature_bias[feature]) * p.map.inverse_root
                             : -kInfinity;
      }
  }
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int buffer = tile & 1;
    const T* const queries = reinterpret_cast<T*>(shared + L::kQuery) + buffer * kTile * W;
    const T* const grad_out = reinterpret_cast<T*>(shared + L::kGradOut) + buffer * kTile * W;
    CpAsyncWait<0>();
    __syncthreads();  // the tile is complete, and nobody reads the other buffer any more
    if (tile + 1 < tiles) issue(tile + 1, buffer ^ 1);
#pragma unroll 1
    for (int j0 = 0; j0 < kTile; j0 += 32) {
      const int lane = Opaque(tid % 32), t = lane % 4;
      BackwardTile<kRowTiles> x;
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m)
            x[m][n][i] = kIs16Bit<T> && linear
                             ? -row_max[buffer * kTile + j0 + n * 8 + 2 * t + (i & 1)]
                             : 0.f;
      FeatureProduct<T, W, kRowTiles>(x, projection, row_feature, queries, j0, lane);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int j = buffer * kTile + j0 + n * 8 + 2 * t + (i & 1);
            float& y = x[m][n][i];
            if (!linear) y = MappedLogit(p.map, y);
            if constexpr (kIs16Bit<T>) {
              if (!linear) y -= row_max[j];
              y += row_bias[m][i / 2];
            } else {  // two large numbers first
              y += row_bias[m][i / 2] - row_max[j];
            }
            y = RowWeight<T>(y, log_sum, j, unit);
            mass[m][i / 2] += y * delta[j];
          }
      SumTokens<T, W, kRowTiles>(sum, x, grad_out, j0, lane);
    }
  }
  const int lane = tid % 32;
  const int64_t part = blockIdx.x * heads + head;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int feature = first_feature + row_feature + m * 16 + lane / 4 + 8 * e;
      const float total = QuadSum(mass[m][e]);
      if (lane % 4 == 0 && feature < features) p.part_mass[part * features + feature] = total;
    }
  StoreSums<W, kRowTiles>(p.part_mean + part * features * p.grad_out.width, p.grad_out.width,
                          features, first_feature + row_feature, sum, 1.f, lane);
}

struct MergeReverseStatesParams {
  WorkTiles splits;
  int64_t heads = 0, groups = 0, features = 0;
  int width = 0;
  const float* part_mean = nullptr;                            // [splits, H, M, E]
  const float* part_mass = nullptr;                            // [splits, H, M]
  const float* before_log_mass = nullptr;                      // [splits, G, M]
  const float *log_mass = nullptr, *mean = nullptr;            // final state [N, G, M(, E)]
  const float *grad_log_mass = nullptr, *grad_mean = nullptr;  // its gradient, likewise
  const float* origin = nullptr;                               // see CausalGradientParams
  int origin_width = 0;                                        // W
  // The reverse state after each split, relative to the state there: [splits, G, M(, E)].
  float *after_mean = nullptr, *after_mass = nullptr;
  // Gradient of the initial state [N, G, M(, E)]: written here for sequences without rows.
  float *grad_initial_log_mass = nullptr, *grad_initial_mean = nullptr;
};

// One warp for each sequence, key/value head and feature.
static __global__ void __launch_bounds__(256, 4)
    MergeReverseStatesKernel(MergeReverseStatesParams p) {
  constexpr int kColumns = 4;  // of a lane: E <= 128
  const int64_t number = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int64_t per_sequence = p.groups * p.features;
  if (number >= p.splits.sequences * per_sequence) return;
  const int lane = threadIdx.x % 32;
  const int64_t sequence = number / per_sequence, feature = number % per_sequence;
  const int64_t group = feature / p.features, each = p.heads / p.groups;
  const int64_t first = FirstWorkTile(p.splits, sequence),
                count = WorkTileCount(p.splits, sequence);

  // What values are less after the first chunk of a split.
  const auto origin = [&](int64_t split, int column) {
    return p.origin == nullptr
               ? 0.f
               : p.origin[((split * 2 + 1) * p.groups + group) * p.origin_width + column];
  };
  float log_mass = p.log_mass[number], sum[kColumns] = {}, mass = 0;
  if (log_mass != -kInfinity) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = lane + 32 * i;
      if (column >= p.width) continue;
      sum[i] = p.grad_mean[number * p.width + column];
      const float less = count > 0 ? origin(first + count - 1, column) : 0.f;
      mass += sum[i] * (p.mean[number * p.width + column] - less);
    }
    mass = WarpSum(mass);
    mass -= p.grad_log_mass[number];
  }
  for (int64_t split = first + count - 1; split >= first; --split) {
    const int64_t row = split * per_sequence + feature;
    if (lane == 0) p.after_mass[row] = mass;
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      if (lane + 32 * i < p.width) p.after_mean[row * p.width + lane + 32 * i] = sum[i];
    if (split == first) break;
    const float before = p.before_log_mass[row];
    const float keep = before == -kInfinity ? 0.f : expf(before - log_mass);
    log_mass = before;
    mass = keep == 0.f ? 0.f : mass * keep;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) sum[i] = keep == 0.f ? 0.f : sum[i] * keep;
    for (int64_t head = group * each; head < (group + 1) * each; ++head) {
      const int64_t part = (split * p.heads + head) * p.features + feature % p.features;
      mass += p.part_mass[part];
#pragma unroll
      for (int i = 0; i < kColumns; ++i)
        if (lane + 32 * i < p.width) sum[i] += p.part_mean[part * p.width + lane + 32 * i];
    }
    if (p.origin == nullptr) continue;
    float more = 0;  // r of values that are less the origin of the split before
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = lane + 32 * i;
      if (column < p.width) more += sum[i] * (origin(split, column) - origin(split - 1, column));
    }
    mass += WarpSum(more);
  }
  if (count > 0) return;
  const bool any = log_mass != -kInfinity;
  if (lane == 0) p.grad_initial_log_mass[number] = any ? p.grad_log_mass[number] : 0.f;
#pragma unroll
  for (int i = 0; i < kColumns; ++i)
    if (lane + 32 * i < p.width) p.grad_initial_mean[number * p.width + lane + 32 * i] = sum[i];
}

}  // namespace cuda
}  // namespace performer
