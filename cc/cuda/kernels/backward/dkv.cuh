// Gradient of Summarize, with the center c = dmean . mean - dlog_mass of each feature
// (backward/center.cuh):
//
//   P[m, j] = exp(b - log_mass)                 dS = P (dmean . v_j - c)
//   over tokens     dw = root (dS slope) k, where it is asked for
//   over features   dv = P^T dmean              dbias_j = sum_m dS
//                   dk = root (dS slope)^T w - scale k sum_m dS
//
// Grid: (splits of all sequences, key/value heads, slices). Masked keys get exactly 0.
#pragma once
#include "cuda/kernels/backward/common.cuh"
#include "cuda/kernels/backward/value_origin.cuh"

namespace performer {
namespace cuda {

template <class T>
struct DkvParams : KeyReadParams<T> {
  const float* log_mass = nullptr;  // [state_count, G, M]
  const float* center = nullptr;    // [state_count, G, M], of CenterKernel
  const float* origin = nullptr;    // [state_count, G, W] in float32, else nullptr
  const T* grad_mean = nullptr;     // [state_count, G, M_pad, W]: the operand
  const float* peak = nullptr;      // [state_count, G] for half, else nullptr: see GradStateScale
  int64_t state_count = 0;          // N, or 1: the same for all sequences
  RowsOf<T> grad_key;               // [B S, G, D]
  RowsOf<T> grad_value;             // [B S, G, E]
  float* grad_bias = nullptr;       // [B, G, S] or nullptr
  int64_t bias_rows = 0;            // S
  float* sum_key = nullptr;    // [B S, G, W], if a block cannot hold all features, else nullptr
  float* sum_value = nullptr;  // likewise
  float* part_projection = nullptr;  // [splits, G, M, D], if it is asked for
};

// kDw: dw is asked for.
template <class T, int W, int kWarps, bool kDw = true>
struct DkvLayout : BackwardLayout<T, W, kWarps> {
  using S = BackwardLayout<T, W, kWarps>;
  static constexpr int kProjection = 0;
  static constexpr int kGradMean = kProjection + S::kFeatureBytes;
  static constexpr int kWeights = kGradMean + S::kFeatureBytes;     // P
  static constexpr int kSummed = kWeights + S::kSummedBytes;        // dS
  static constexpr int kKey = kSummed + S::kSummedBytes;            // [kStages] tiles
  static constexpr int kValue = kKey + S::kStages * S::kTileBytes;  // likewise
  static constexpr int kKeyBias =
      kValue + S::kStages * S::kTileBytes;  // float [2][kTile], as given
  static constexpr int kStream = kKeyBias + 2 * kTile * 4;
  static constexpr int kBytes = kStream + KeyStream<T, W, S::kThreads>::kSharedBytes;
  static_assert(kBytes <= S::kMaxBytes);
};

// What one block does, in phases.
template <class T, int W, int kWarps, bool kDw>
struct DkvBlock {
  using L = DkvLayout<T, W, kWarps>;
  static constexpr int kRowTiles = L::kRowTiles, kThreads = L::kThreads;

  const DkvParams<T>& p;
  unsigned char* shared;
  WorkTile work;
  int64_t head, state;        // of keys; the row of [state_count, G]
  float weight_scale, scale;  // half: P and dmean are multiplied by powers of two, dS by both

  // What a thread holds of its features: dw, -log_mass in units of root, and center.
  struct Features {
    float sum_projection[kRowTiles][kSlice<W> / 8][4] = {};
    float row_bias[kRowTiles][2], center[kRowTiles][2];
  };

  PERFORMER_DEVICE T* tile(int offset) const { return reinterpret_cast<T*>(shared + offset); }
  // Of the tiles at `offset`, the one of this parity.
  PERFORMER_DEVICE T* tile(int offset, int parity) const {
    return tile(offset) + (L::kStages == 2 ? parity * kTile * W : 0);
  }
  PERFORMER_DEVICE int features() const { return static_cast<int>(p.features); }
  PERFORMER_DEVICE static int feature0(int tid) { return tid / 32 * 16 * kRowTiles; }
  PERFORMER_DEVICE static int begin() { return SliceBegin<W>(blockIdx.z); }

  // Starts copying the projection and dmean.
  PERFORMER_DEVICE void IssueFeatures(int first_feature, int tid) const {
    const T* w = p.projection.At(p.projection.heads == 1 ? 0 : head, p.features_pad, W);
    const int left = static_cast<int>(p.features_pad) - first_feature;
    CopyOperand<T, W, L::kFeatures, kThreads>(tile(L::kProjection), w + first_feature * W, left,
                                              tid);
    CopyOperand<T, W, L::kFeatures, kThreads>(
        tile(L::kGradMean), p.grad_mean + (state * p.features_pad + first_feature) * W, left, tid);
    CpAsyncCommit();
  }

  PERFORMER_DEVICE void LoadFeatures(Features& own, int first_feature, int tid) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int feature = first_feature + feature0(tid) + m * 16 + tid % 32 / 4 + 8 * e;
        const int64_t at = state * features() + feature;
        const float log_mass = feature < features() ? p.log_mass[at] : -kInfinity;
        // A feature that saw nothing weighs nothing.
        own.row_bias[m][e] = -kInfinity;
        if (log_mass != -kInfinity) {
          own.row_bias[m][e] = -log_mass * p.map.inverse_root;
          if constexpr (std::is_same_v<T, Half>)
            own.row_bias[m][e] += log2f(weight_scale) / p.map.unit();
        }
        own.center[m][e] = feature < features() ? p.center[at] : 0.f;
      }
  }

  // P and dS of 32 keys from j0 to shared memory; dw takes dS, if the map is linear.
  PERFORMER_DEVICE void TakeKeys(Features& own, const float* bias, const T* keys, const T* values,
                                 int j0, int tid) const {
    const int lane = Opaque(tid % 32), t = lane % 4;
    const bool linear = p.map.linear();
    const float unit = p.map.unit();
    BackwardTile<kRowTiles> x, ds;
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float start = linear ? bias[j0 + n * 8 + 2 * t + (i & 1)] : 0.f;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) x[m][n][i] = start, ds[m][n][i] = -own.center[m][i / 2];
      }
    FeatureProduct<T, W, kRowTiles>(x, tile(L::kProjection), feature0(tid), keys, j0, lane);
    FeatureProduct<T, W, kRowTiles>(ds, tile(L::kGradMean), feature0(tid), values, j0, lane);
    if (!linear)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) MapLogits(x[m], p.map, bias + j0, t);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float &y = x[m][n][i], &d = ds[m][n][i];
          y = Exp2((y + own.row_bias[m][i / 2]) * unit);
          d *= y;
        }
    StoreSummed<T, kRowTiles>(tile(L::kWeights), x, feature0(tid), j0, lane);
    StoreSummed<T, kRowTiles>(tile(L::kSummed), ds, feature0(tid), j0, lane);
    if (kDw && linear) SumTokens<T, W, kRowTiles>(own.sum_projection, ds, keys, j0, begin(), lane);
  }

  // Maps that are not linear: dS *= slope in shared memory, and dw takes it.
  PERFORMER_DEVICE void ChainSlopes(Features& own, const T* keys, int lane, int tid) const {
#pragma unroll 1
    for (int j0 = 0; j0 < kTile; j0 += 32) {
      BackwardTile<kRowTiles> ds;
      LoadSummed<T, kRowTiles>(ds, tile(L::kSummed), feature0(tid), j0, lane);
      ChainSlope<T, W, kRowTiles>(ds, p.map, tile(L::kProjection), feature0(tid), keys, j0, lane);
      StoreSummed<T, kRowTiles>(tile(L::kSummed), ds, feature0(tid), j0, lane);
      if (kDw) SumTokens<T, W, kRowTiles>(own.sum_projection, ds, keys, j0, begin(), lane);
    }
  }

  // dk, dv and the gradient of key_bias of a tile. total: this lane's share of the sum of dS over
  // features, if the map is not linear. key_bias: of the tile, as given.
  PERFORMER_DEVICE void StoreRowGradients(float (&total)[2], bool first_block, bool last_block,
                                          int number, const T* keys, const float* key_bias, int r0,
                                          int warp, int lane) const {
    const bool linear = p.map.linear();
    const int64_t row0 = work.first_row + work.begin;
    const int rows = static_cast<int>(work.end - work.begin);
#pragma unroll 1
    for (int i = 0; i < L::kWarpColumns; i += L::kColumns) {
      const int c0 = begin() + warp / 4 * L::kWarpColumns + i;
      float dv[L::kColumns / 8][4] = {}, dk[L::kColumns / 8][4] = {}, unused[2];
      SumFeatures<T, W, L::kFeatures, L::kColumns, false>(dv, unused, tile(L::kWeights),
                                                          tile(L::kGradMean), r0, c0, lane);
      if (linear && i == 0)
        SumFeatures<T, W, L::kFeatures, L::kColumns, true>(dk, total, tile(L::kSummed),
                                                           tile(L::kProjection), r0, c0, lane);
      else
        SumFeatures<T, W, L::kFeatures, L::kColumns, false>(dk, unused, tile(L::kSummed),
                                                            tile(L::kProjection), r0, c0, lane);
      if (i == 0) total[0] = QuadSum(total[0]) / scale, total[1] = QuadSum(total[1]) / scale;
      const float factor = p.map.root / scale;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = r0 + lane / 4 + 8 * e, row = number * kTile + r;
        if (row >= rows) continue;
        const bool masked = key_bias[r] == -kInfinity;
        const float norm = p.map.key_norm ? p.map.root * p.map.root * total[e] : 0.f;
        const int64_t at = (row0 + row) * p.groups + head;
#pragma unroll
        for (int n = 0; n < L::kColumns / 8; ++n) {
          const int column = c0 + n * 8 + 2 * (lane % 4);
          const float2 k = LoadPair(keys + At<T, W>(r, column));
          float2 x = {dk[n][2 * e] * factor, dk[n][2 * e + 1] * factor};
          float2 y = {dv[n][2 * e] / scale, dv[n][2 * e + 1] / scale};
          if (p.map.key_norm) x.x -= norm * k.x, x.y -= norm * k.y;
          if (!(first_block && last_block)) {  // of this thread alone, over the feature blocks
            float2* sum_key = reinterpret_cast<float2*>(p.sum_key + at * W + column);
            float2* sum_value = reinterpret_cast<float2*>(p.sum_value + at * W + column);
            if (!first_block) {
              x.x += sum_key->x, x.y += sum_key->y;
              y.x += sum_value->x, y.y += sum_value->y;
            }
            *sum_key = x;
            *sum_value = y;
          }
          if (!last_block) continue;
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
        if (!first_block) sum += *to;
        *to = last_block && masked ? 0.f : sum;
      }
    }
  }
};

template <class T, int W, int kWarps, bool kDw>
__global__ void __launch_bounds__(32 * kWarps, 1) DkvKernel(DkvParams<T> p) {
  using Block = DkvBlock<T, W, kWarps, kDw>;
  using L = typename Block::L;
  PERFORMER_SHARED_MEMORY(shared);
  float* const key_biases = reinterpret_cast<float*>(shared + L::kKeyBias);
  const int tid = threadIdx.x;
  const WorkTile work = GetWorkTile(p.work, blockIdx.x);
  const int64_t head = blockIdx.y;
  const int64_t state = (p.state_count == 1 ? 0 : work.sequence) * p.groups + head;
  const float weight_scale = std::is_same_v<T, Half> ? kWeightScale : 1.f;
  const float scale =
      std::is_same_v<T, Half> ? weight_scale * GradStateScale<T>(p.peak[state]) : 1.f;
  const Block block = {p, shared, work, head, state, weight_scale, scale};
  const int tiles = static_cast<int>(CeilDiv(static_cast<int>(work.end - work.begin), kTile));
  KeyStream<T, W, L::kThreads> stream(p.keys, p.map, work, head, shared + L::kStream, tid);
  const auto issue = [&](int number, int buffer) {
    stream.Issue(number, buffer, block.tile(L::kKey, buffer), block.tile(L::kValue, buffer), tid);
  };

  const int features = block.features();
#pragma unroll 1
  for (int first_feature = 0; first_feature < features; first_feature += L::kFeatures) {
    const bool first_block = first_feature == 0;
    const bool last_block = first_feature + L::kFeatures >= features;
    __syncthreads();  // nobody reads the last features and keys any more
    block.IssueFeatures(first_feature, tid);
    stream.LoadKeyBias(0, tid);
    if constexpr (L::kStages == 2) {
      stream.StoreKeyBias(0, tid);
      __syncthreads();  // the masks of the first tile are visible
      issue(0, 0);
      stream.LoadKeyBias(1, tid);
    }
    typename Block::Features own;
    block.LoadFeatures(own, first_feature, tid);
#pragma unroll 1
    for (int number = 0; number < tiles; ++number) {
      const int parity = number & 1, buffer = L::kStages == 2 ? parity : 0, other = buffer ^ 1;
      T* const keys = block.tile(L::kKey, parity);
      T* const values = block.tile(L::kValue, parity);
      float* const key_bias = key_biases + parity * kTile;
      if constexpr (L::kStages == 1) {
        stream.StoreKeyBias(0, tid);
        __syncthreads();  // [0] nobody reads the last tile any more
        issue(number, 0);
        stream.LoadKeyBias(number + 1, tid);
      }
      CpAsyncWait<0>();
      stream.ComputeBias(buffer, keys, tid);
      if constexpr (!kIs16Bit<T>)
        SubtractOrigin<T, W, kTile, L::kThreads>(values, p.origin + state * W, tid);
      if (tid < kTile) key_bias[tid] = stream.key_bias[buffer * kTile + tid];
      if constexpr (L::kStages == 2) stream.StoreKeyBias(other, tid);
      __syncthreads();  // [1] the tile is complete; the other buffers, P and dS are free
      if constexpr (L::kStages == 2)
        if (number + 1 < tiles) {
          issue(number + 1, other);
          stream.LoadKeyBias(number + 2, tid);
        }
#pragma unroll 1
      for (int j0 = 0; j0 < kTile; j0 += 32)
        block.TakeKeys(own, stream.bias + buffer * kTile, keys, values, j0, tid);
      __syncthreads();  // [2] P and dS are visible
      const int id = Opaque(tid), lane = id % 32, warp = id / 32, r0 = warp % 4 * 16;
      float total[2] = {};  // of dS over features, of the rounded operand: errors cancel in dk
      if (!p.map.linear()) {
        TotalOfFeatures<T, L::kFeatures>(total, block.tile(L::kSummed), r0, lane);
        __syncthreads();  // [3] dS may be overwritten
        block.ChainSlopes(own, keys, lane, tid);
        __syncthreads();  // [4] dS slope is visible
      }
      block.StoreRowGradients(total, first_block, last_block, number, keys, key_bias, r0, warp,
                              lane);
    }

    if constexpr (kDw)
      StoreSums(p.part_projection + (blockIdx.x * p.groups + head) * features * p.keys.key.width,
                p.keys.key.width, features, first_feature + Block::feature0(tid),
                own.sum_projection, p.map.root / scale, Block::begin(), tid % 32);
  }
}

}  // namespace cuda
}  // namespace performer
