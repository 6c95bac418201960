// Gradient of Summarize, with the center c = dmean . mean - dlog_mass of each feature
// (backward/center.cuh):
//   P[m, j] = exp(b - log_mass)      dS = P (dmean . v_j - c)
//   over tokens      dw = root (dS slope) k
//   over features   dv = P^T dmean      dbias_j = sum_m dS
//                    dk = root (dS slope)^T w - scale k sum_m dS
//
// Grid: (splits of all sequences, key/value heads). Masked keys get exactly 0.
#pragma once
#include "cuda/kernels/backward/common.cuh"

namespace performer {
namespace cuda {

template <class T>
struct DkvParams : KeyReadParams<T> {
  const float* log_mass = nullptr;  // [state_count, G, M]
  const float* center = nullptr;    // [state_count, G, M], of CenterKernel
  const T* grad_mean = nullptr;     // [state_count, G, M_pad, W]: the operand
  const float* peak = nullptr;      // [state_count, G] for half, else nullptr: see GradStateScale
  int64_t state_count = 0;          // N, or 1: the same for all sequences
  RowsOf<T> grad_key;               // [B S, G, D]
  RowsOf<T> grad_value;             // [B S, G, E]
  float* grad_bias = nullptr;       // [B, G, S] or nullptr
  int64_t bias_rows = 0;            // S
  float* sum_key = nullptr;    // [B S, G, W], if a block cannot hold all features, else nullptr
  float* sum_value = nullptr;  // likewise
  float* part_projection = nullptr;  // [splits, G, M, D]
};

template <class T, int W, int kWarps>
struct DkvLayout : BackwardLayout<T, W, kWarps> {
  using S = BackwardLayout<T, W, kWarps>;
  static constexpr int kGradMean = S::kFeatureBytes;                   // after the projection
  static constexpr int kWeights = kGradMean + S::kFeatureBytes;        // P
  static constexpr int kSummed = kWeights + S::kSummedBytes;           // dS
  static constexpr int kKey = kSummed + S::kSummedBytes;               // [kStages] tiles
  static constexpr int kValue = kKey + S::kStages * S::kTileBytes;     // likewise
  static constexpr int kHidden = kValue + S::kStages * S::kTileBytes;  // float [2][kTile]
  static constexpr int kStream = kHidden + 2 * kTile * 4;
  static constexpr int kBytes = kStream + KeyStream<T, W, S::kThreads>::kSharedBytes;
  static_assert(kBytes <= S::kMostBytes);
};

template <class T, int W, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 1) DkvKernel(DkvParams<T> p) {
  using L = DkvLayout<T, W, kWarps>;
  constexpr int kRowTiles = L::kRowTiles, kThreads = L::kThreads;
  PERFORMER_SHARED_MEMORY(shared);
  T* const projection = reinterpret_cast<T*>(shared);
  T* const grad_mean = reinterpret_cast<T*>(shared + L::kGradMean);
  T* const weights = reinterpret_cast<T*>(shared + L::kWeights);
  T* const summed = reinterpret_cast<T*>(shared + L::kSummed);
  float* const hidden = reinterpret_cast<float*>(shared + L::kHidden);  // key_bias of the tile
  const int tid = threadIdx.x;
  const WorkTile work = GetWorkTile(p.work, blockIdx.x);
  const int64_t head = blockIdx.y;
  const int64_t state = (p.state_count == 1 ? 0 : work.sequence) * p.groups + head;
  const int64_t row0 = work.first_row + work.begin;
  const int rows = static_cast<int>(work.end - work.begin);
  const int tiles = static_cast<int>(CeilDiv(rows, kTile));
  const bool linear = p.map.linear();
  const float unit = p.map.unit();
  // Half: P and dmean are multiplied by powers of two, dS by both.
  const float weight_scale = std::is_same_v<T, Half> ? kWeightScale : 1.f;
  const float scale =
      std::is_same_v<T, Half> ? weight_scale * GradStateScale<T>(p.peak[state]) : 1.f;
  KeyStream<T, W, kThreads> stream(p.keys, p.map, work, head, shared + L::kStream, tid);
  const auto tile_of = [&](int offset, int parity) {
    return reinterpret_cast<T*>(shared + offset) + (L::kStages == 2 ? parity * kTile * W : 0);
  };

  const int features = static_cast<int>(p.features);
#pragma unroll 1
  for (int first_feature = 0; first_feature < features; first_feature += L::kFeatures) {
    const bool is_first = first_feature == 0, is_last = first_feature + L::kFeatures >= features;
    const int row_feature = tid / 32 * 16 * kRowTiles;
    __syncthreads();  // nobody reads the last features and keys any more
    {
      const T* w = p.projection.At(p.projection.heads == 1 ? 0 : head, p.features_pad, W);
      const int left = static_cast<int>(p.features_pad) - first_feature;
      CopyOperand<T, W, L::kFeatures, kThreads>(projection, w + first_feature * W, left, tid);
      CopyOperand<T, W, L::kFeatures, kThreads>(
          grad_mean, p.grad_mean + (state * p.features_pad + first_feature) * W, left, tid);
      CpAsyncCommit();
    }
    stream.Fetch(0, tid);
    if constexpr (L::kStages == 2) {
      stream.Publish(0, tid);
      __syncthreads();  // the masks of the first tile are visible
      stream.Issue(0, 0, tile_of(L::kKey, 0), tile_of(L::kValue, 0), tid);
      stream.Fetch(1, tid);
    }
    float sum_projection[kRowTiles][W / 8][4] = {};
    float row_bias[kRowTiles][2], center[kRowTiles][2];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int feature = first_feature + row_feature + m * 16 + tid % 32 / 4 + 8 * e;
        const int64_t at = state * features + feature;
        const float log_mass = feature < features ? p.log_mass[at] : -kInfinity;
        // A feature that saw nothing weighs nothing.
        row_bias[m][e] = -kInfinity;
        if (log_mass != -kInfinity) {
          row_bias[m][e] = -log_mass * p.map.inverse_root;
          if constexpr (std::is_same_v<T, Half>) row_bias[m][e] += log2f(weight_scale) / unit;
        }
        center[m][e] = feature < features ? p.center[at] : 0.f;
      }
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      const int parity = tile & 1, buffer = L::kStages == 2 ? parity : 0, other = buffer ^ 1;
      T* const keys = tile_of(L::kKey, parity);
      T* const values = tile_of(L::kValue, parity);
      if constexpr (L::kStages == 1) {
        stream.Publish(0, tid);
        __syncthreads();  // [0] nobody reads the last tile any more
        stream.Issue(tile, 0, keys, values, tid);
        stream.Fetch(tile + 1, tid);
      }
      CpAsyncWait<0>();
      stream.Arrived(buffer, keys, tid);
      if (tid < kTile) hidden[parity * kTile + tid] = stream.raw[buffer * kTile + tid];
      if constexpr (L::kStages == 2) stream.Publish(other, tid);
      __syncthreads();  // [1] the tile is complete; the other buffers, P and dS are free
      if constexpr (L::kStages == 2)
        if (tile + 1 < tiles) {
          stream.Issue(tile + 1, other, tile_of(L::kKey, other), tile_of(L::kValue, other), tid);
          stream.Fetch(tile + 2, tid);
        }
      const float* const bias = stream.bias + buffer * kTile;
#pragma unroll 1
      for (int j0 = 0; j0 < kTile; j0 += 32) {
        const int lane = Opaque(tid % 32), t = lane % 4;
        BackwardTile<kRowTiles> x, ds;
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float start = linear ? bias[j0 + n * 8 + 2 * t + (i & 1)] : 0.f;
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) x[m][n][i] = start, ds[m][n][i] = -center[m][i / 2];
          }
        FeatureProduct<T, W, kRowTiles>(x, projection, row_feature, keys, j0, lane);
        FeatureProduct<T, W, kRowTiles>(ds, grad_mean, row_feature, values, j0, lane);
        if (!linear)
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i)
                x[m][n][i] = MappedLogit(p.map, x[m][n][i]) + bias[j0 + n * 8 + 2 * t + (i & 1)];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              float &y = x[m][n][i], &d = ds[m][n][i];
              y = Exp2((y + row_bias[m][i / 2]) * unit);
              d *= y;
            }
        StoreSummed<T, kRowTiles>(weights, x, row_feature, j0, lane);
        StoreSummed<T, kRowTiles>(summed, ds, row_feature, j0, lane);
        if (linear) SumTokens<T, W, kRowTiles>(sum_projection, ds, keys, j0, lane);
      }
      __syncthreads();  // [2] P and dS are visible
      const int id = Opaque(tid), lane = id % 32, warp = id / 32, r0 = warp % 4 * 16;
      float total[2] = {};  // of dS over features, of the rounded operand: errors cancel in dk
      if (!linear) {
        TotalOfFeatures<T, L::kFeatures>(total, summed, r0, lane);
        __syncthreads();  // [3] dS may be overwritten
#pragma unroll 1
        for (int j0 = 0; j0 < kTile; j0 += 32) {
          BackwardTile<kRowTiles> ds;
          LoadSummed<T, kRowTiles>(ds, summed, row_feature, j0, lane);
          ChainSlope<T, W, kRowTiles>(ds, p.map, projection, row_feature, keys, j0, lane);
          StoreSummed<T, kRowTiles>(summed, ds, row_feature, j0, lane);
          SumTokens<T, W, kRowTiles>(sum_projection, ds, keys, j0, lane);
        }
        __syncthreads();  // [4] dS slope is visible
      }
#pragma unroll 1
      for (int i = 0; i < L::kWarpColumns; i += L::kColumns) {
        const int c0 = warp / 4 * L::kWarpColumns + i;
        float dv[L::kColumns / 8][4] = {}, dk[L::kColumns / 8][4] = {}, unused[2];
        SumFeatures<T, W, L::kFeatures, L::kColumns, false>(dv, unused, weights, grad_mean, r0, c0,
                                                            lane);
        if (linear && i == 0)
          SumFeatures<T, W, L::kFeatures, L::kColumns, true>(dk, total, summed, projection, r0, c0,
                                                             lane);
        else
          SumFeatures<T, W, L::kFeatures, L::kColumns, false>(dk, unused, summed, projection, r0,
                                                              c0, lane);
        if (i == 0) total[0] = QuadSum(total[0]) / scale, total[1] = QuadSum(total[1]) / scale;
        const float factor = p.map.root / scale;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int r = r0 + lane / 4 + 8 * e, row = tile * kTile + r;
          if (row >= rows) continue;
          const bool masked = hidden[parity * kTile + r] == -kInfinity;
          const float norm = p.map.key_norm ? p.map.root * p.map.root * total[e] : 0.f;
          const int64_t at = (row0 + row) * p.groups + head;
#pragma unroll
          for (int n = 0; n < L::kColumns / 8; ++n) {
            const int column = c0 + n * 8 + 2 * (lane % 4);
            const float2 k = LoadPair(keys + At<T, W>(r, column));
            float2 x = {dk[n][2 * e] * factor, dk[n][2 * e + 1] * factor};
            float2 y = {dv[n][2 * e] / scale, dv[n][2 * e + 1] / scale};
            if (p.map.key_norm) x.x -= norm * k.x, x.y -= norm * k.y;
            if (!(is_first && is_last)) {  // of this thread alone, over the groups of features
              float2* sum_key = reinterpret_cast<float2*>(p.sum_key + at * W + column);
              float2* sum_value = reinterpret_cast<float2*>(p.sum_value + at * W + column);
              if (!is_first) {
                x.x += sum_key->x, x.y += sum_key->y;
                y.x += sum_value->x, y.y += sum_value->y;
              }
              *sum_key = x;
              *sum_value = y;
            }
            if (!is_last) continue;
            if (masked) x = y = float2{0.f, 0.f};
            StoreColumns(p.grad_key.Row(row0 + row, head), column, p.grad_key.width,
                         p.grad_key.aligned, x.x, x.y);
            StoreColumns(p.grad_value.Row(row0 + row, head), column, p.grad_value.width,
                         p.grad_value.aligned, y.x, y.y);
          }
          if (c0 != 0 || lane % 4 != 0 || p.grad_bias == nullptr) continue;
          const int64_t batch = p.keys.packed ? 0 : work.sequence;
          float* to = p.grad_bias + (batch * p.groups + head) * p.bias_rows +
                      (p.keys.packed ? work.first_row : 0) + work.begin + row;
          float sum = total[e];
          if (!is_first) sum += *to;
          *to = is_last && masked ? 0.f : sum;
        }
      }
    }

    StoreSums<W, kRowTiles>(
        p.part_projection + (blockIdx.x * p.groups + head) * features * p.keys.key.width,
        p.keys.key.width, features, first_feature + row_feature, sum_projection, p.map.root / scale,
        tid % 32);
  }
}

}  // namespace cuda
}  // namespace performer
