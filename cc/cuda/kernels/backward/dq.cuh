// Gradient of Read. With the statistics of each row (backward/row_statistics.cuh):
//   P[m, i] = exp(a + log_mass - lse_i)      dS = P (mean . grad_out_i - delta_i)
//   over tokens      dmean = P grad_out      dlog_mass = dS 1      dw = root (dS slope) q
//   over features   dq = root (dS slope)^T w
//
// Grid: (splits of all sequences, query heads). Sums over tokens are partial results of a
// split and head, for backward/sum_partials.cuh.
#pragma once
#include "cuda/kernels/backward/common.cuh"

namespace performer {
namespace cuda {

template <class T>
struct DqParams : StateReadParams<T> {
  RowsOf<const T> grad_out;  // [B L, H, E]
  // [B L, H] each, of RowStatisticsKernel.
  const float *lse = nullptr, *delta = nullptr, *peak = nullptr;
  RowsOf<T> grad_query;        // [B L, H, D]
  float* sum_query = nullptr;  // [B L, H, W], if a block cannot hold all features, else nullptr
  // [splits, H, M], [splits, H, M, E] and [splits, H, M, D].
  float *part_log_mass = nullptr, *part_mean = nullptr, *part_projection = nullptr;
};

// Where a block works; in shared memory, as KeyPlace.
template <class T>
struct DqPlace {
  const T *query, *grad_out;  // the split's first row
  const float *lse, *delta;   // likewise
  T* grad_query;
  float* sum_query;
  const T *projection, *mean;            // of the first feature
  const float *log_mass, *feature_bias;  // likewise
  int rows;
};

template <class T, int W, int kWarps>
struct DqLayout : BackwardLayout<T, W, kWarps> {
  using S = BackwardLayout<T, W, kWarps>;
  static constexpr int kMean = S::kFeatureBytes;                        // after the projection
  static constexpr int kSummed = kMean + S::kFeatureBytes;              // dS
  static constexpr int kQuery = kSummed + S::kSummedBytes;              // [kStages] tiles
  static constexpr int kGradOut = kQuery + S::kStages * S::kTileBytes;  // likewise
  static constexpr int kLse = kGradOut + S::kStages * S::kTileBytes;    // float [2][kTile]
  static constexpr int kDelta = kLse + 2 * kTile * 4;                   // likewise
  static constexpr int kBlockMax = kDelta + 2 * kTile * 4;
  static constexpr int kRowBias = kBlockMax + S::kWarps * 4;  // float [kFeatures]
  static constexpr int kPlace = kRowBias + S::kFeatures * 4;
  static constexpr int kBytes = kPlace + static_cast<int>(sizeof(DqPlace<T>));
  static_assert(kBytes <= S::kMostBytes);
};

template <class T, int W, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 1) DqKernel(DqParams<T> p) {
  using L = DqLayout<T, W, kWarps>;
  constexpr int kRowTiles = L::kRowTiles, kThreads = L::kThreads;
  PERFORMER_SHARED_MEMORY(shared);
  T* const projection = reinterpret_cast<T*>(shared);
  T* const mean = reinterpret_cast<T*>(shared + L::kMean);
  T* const summed = reinterpret_cast<T*>(shared + L::kSummed);
  float* const lse = reinterpret_cast<float*>(shared + L::kLse);
  float* const delta = reinterpret_cast<float*>(shared + L::kDelta);
  const auto* place = reinterpret_cast<const DqPlace<T>*>(shared + L::kPlace);
  float* const row_bias = reinterpret_cast<float*>(shared + L::kRowBias);
  const int tid = threadIdx.x;
  const int heads = static_cast<int>(p.query.heads);
  if (tid == 0) {
    const WorkTile work = GetWorkTile(p.work, blockIdx.x);
    const int64_t head = blockIdx.y, group = head / (heads / p.groups);
    const int64_t state = (p.state_count == 1 ? 0 : work.sequence) * p.groups + group;
    const int64_t row0 = work.first_row + work.begin, at = row0 * heads + head;
    *const_cast<DqPlace<T>*>(place) = {
        p.query.Row(row0, head),
        p.grad_out.Row(row0, head),
        p.lse + at,
        p.delta + at,
        p.grad_query.Row(row0, head),
        p.sum_query == nullptr ? nullptr : p.sum_query + at * W,
        p.projection.At(QueryHeadIndex(p.projection.heads, head, heads, group), p.features_pad, W),
        p.mean + state * p.features_pad * W,
        p.log_mass + state * p.features,
        p.feature_bias + QueryHeadIndex(p.feature_bias_heads, head, heads, group) * p.features,
        static_cast<int>(work.end - work.begin)};
  }
  __syncthreads();  // the place is known
  const int tiles = static_cast<int>(CeilDiv(place->rows, kTile));
  const bool linear = p.map.linear();
  const float unit = p.map.unit();
  float scale = 1;
  if constexpr (std::is_same_v<T, Half>)
    scale = LogitGradientScale<T>(
        BlockMax<kWarps>(p.peak + (place->lse - p.lse), heads, place->rows,
                         reinterpret_cast<float*>(shared + L::kBlockMax), tid));

  const auto issue = [&](int tile, int parity) {
    const int buffer = L::kStages == 2 ? parity * kTile * W : 0, first = tile * kTile;
    const auto valid = [&](int r) { return first + r < place->rows; };
    CopyRows<T, W, kTile, kThreads>(reinterpret_cast<T*>(shared + L::kQuery) + buffer, place->query,
                                    first, p.query, tid, valid);
    CopyRows<T, W, kTile, kThreads>(reinterpret_cast<T*>(shared + L::kGradOut) + buffer,
                                    place->grad_out, first, p.grad_out, tid, valid);
    CpAsyncCommit();
    if (tid < kTile)
      LoadStatistics(lse + parity * kTile + tid, delta + parity * kTile + tid, place->lse,
                     place->delta, static_cast<int64_t>(first + tid) * heads, valid(tid), p.map);
  };

  const int features = static_cast<int>(p.features);
#pragma unroll 1
  for (int first_feature = 0; first_feature < features; first_feature += L::kFeatures) {
    const bool is_first = first_feature == 0, is_last = first_feature + L::kFeatures >= features;
    const int row_feature = tid / 32 * 16 * kRowTiles;
    __syncthreads();  // nobody reads the last features any more
    {
      const int left = static_cast<int>(p.features_pad) - first_feature;
      CopyOperand<T, W, L::kFeatures, kThreads>(projection, place->projection + first_feature * W,
                                                left, tid);
      CopyOperand<T, W, L::kFeatures, kThreads>(mean, place->mean + first_feature * W, left, tid);
    }
    if (L::kStages == 2) issue(0, 0);
    float sum_mean[kRowTiles][W / 8][4] = {}, sum_projection[kRowTiles][W / 8][4] = {};
    float sum_log_mass[kRowTiles][2] = {};
    for (int i = tid; i < L::kFeatures; i += kThreads) {  // visible at [1]
      const int feature = first_feature + i;
      row_bias[i] = feature < features ? (place->log_mass[feature] + place->feature_bias[feature]) *
                                             p.map.inverse_root
                                       : -kInfinity;
    }
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int parity = tile & 1, buffer = L::kStages == 2 ? parity * kTile * W : 0;
      const T* const queries = reinterpret_cast<T*>(shared + L::kQuery) + buffer;
      const T* const grad_out = reinterpret_cast<T*>(shared + L::kGradOut) + buffer;
      if constexpr (L::kStages == 1) issue(tile, parity);  // nobody reads a tile after its [2]
      CpAsyncWait<0>();
      __syncthreads();  // [1] the tile is complete; the other buffers and dS are free
      if (L::kStages == 2 && tile + 1 < tiles) issue(tile + 1, parity ^ 1);
#pragma unroll 1
      for (int j0 = 0; j0 < kTile; j0 += 32) {
        const int lane = Opaque(tid % 32), t = lane % 4;
        BackwardTile<kRowTiles> x, ds;
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int j = parity * kTile + j0 + n * 8 + 2 * t + (i & 1);
            const float start = linear ? -lse[j] : 0.f, center = -delta[j];
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) x[m][n][i] = start, ds[m][n][i] = center;
          }
        FeatureProduct<T, W, kRowTiles>(x, projection, row_feature, queries, j0, lane);
        FeatureProduct<T, W, kRowTiles>(ds, mean, row_feature, grad_out, j0, lane);
        if (!linear)
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i)
                x[m][n][i] = MappedLogit(p.map, x[m][n][i]) -
                             lse[parity * kTile + j0 + n * 8 + 2 * t + (i & 1)];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float own = row_bias[row_feature + m * 16 + lane / 4 + i / 2 * 8];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              float &y = x[m][n][i], &d = ds[m][n][i];
              y = Exp2((y + own) * unit);
              d *= y;
              if constexpr (std::is_same_v<T, Half>) d *= scale;
              sum_log_mass[m][i / 2] += d;
            }
          }
        SumTokens<T, W, kRowTiles>(sum_mean, x, grad_out, j0, Opaque(lane));
        if (!linear)
          ChainSlope<T, W, kRowTiles>(ds, p.map, projection, row_feature, queries, j0, lane);
        StoreSummed<T, kRowTiles>(summed, ds, row_feature, j0, lane);
        SumTokens<T, W, kRowTiles>(sum_projection, ds, queries, j0, Opaque(lane));
      }
      __syncthreads();  // [2] dS is visible
      const int id = Opaque(tid), lane = id % 32, warp = id / 32, r0 = warp % 4 * 16;
#pragma unroll 1
      for (int i = 0; i < L::kWarpColumns; i += L::kColumns) {
        const int c0 = warp / 4 * L::kWarpColumns + i;
        float dq[L::kColumns / 8][4] = {}, unused[2];
        SumFeatures<T, W, L::kFeatures, L::kColumns, false>(dq, unused, summed, projection, r0, c0,
                                                            lane);
        const float factor = p.map.root / scale;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = tile * kTile + r0 + lane / 4 + 8 * e;
          if (row >= place->rows) continue;
          T* to = place->grad_query + static_cast<int64_t>(row) * p.grad_query.stride;
#pragma unroll
          for (int n = 0; n < L::kColumns / 8; ++n) {
            const int column = c0 + n * 8 + 2 * (lane % 4);
            float2 y = {dq[n][2 * e] * factor, dq[n][2 * e + 1] * factor};
            if (AddPart(y, place->sum_query, static_cast<int64_t>(row) * heads * W + column,
                        is_first, is_last))
              StoreColumns(to, column, p.grad_query.width, p.grad_query.aligned, y.x, y.y);
          }
        }
      }
    }

    const int lane = tid % 32;
    const int64_t part = static_cast<int64_t>(blockIdx.x) * heads + blockIdx.y;
    const float factor = 1.f / scale;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int feature = first_feature + row_feature + m * 16 + lane / 4 + 8 * e;
        const float sum = QuadSum(sum_log_mass[m][e]) * factor;
        if (lane % 4 == 0 && feature < features) p.part_log_mass[part * features + feature] = sum;
      }
    StoreSums<W, kRowTiles>(p.part_mean + part * features * p.grad_out.width, p.grad_out.width,
                            features, first_feature + row_feature, sum_mean, 1.f, lane);
    StoreSums<W, kRowTiles>(p.part_projection + part * features * p.query.width, p.query.width,
                            features, first_feature + row_feature, sum_projection,
                            p.map.root * factor, lane);
  }
}

}  // namespace cuda
}  // namespace performer
