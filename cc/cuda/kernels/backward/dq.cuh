// Gradient of Read. With the statistics of each row (backward/row_statistics.cuh):
//
//   P[m, i] = exp(a + log_mass - row_max_i) 2^-log_sum_i
//   dS = P (mean . grad_out_i - delta_i)
//   over tokens     dmean = P grad_out          dlog_mass = dS 1     dw = root (dS slope) q
//   over features   dq = root (dS slope)^T w
//
// Grid: (splits of all sequences, query heads). Sums over tokens are partial results of a split and
// head, for backward/sum_partials.cuh.
#pragma once
#include "cuda/kernels/backward/common.cuh"

namespace performer {
namespace cuda {

template <class T>
struct DqParams : StateReadParams<T> {
  RowsOf<const T> grad_out;  // [B L, H, E]
  // [B L, H] each, of RowStatisticsKernel.
  RowStatistics statistics;
  const float* peak = nullptr;
  RowsOf<T> grad_query;        // [B L, H, D]
  float* sum_query = nullptr;  // [B L, H, W], if a block cannot hold all features, else nullptr
  // [splits, H, M], [splits, H, M, E] and [splits, H, M, D].
  float *part_log_mass = nullptr, *part_mean = nullptr, *part_projection = nullptr;
};

// The block pointers; in shared memory, as KeyPointers.
template <class T>
struct DqPointers {
  const T *query, *grad_out;             // [rows, H, D or E], from the split's first row on
  RowStatistics statistics;              // [rows, H], likewise
  T* grad_query;                         // [rows, H, D], likewise
  float* sum_query;                      // [rows, H, W], likewise, or nullptr
  const T *projection, *mean;            // [M_pad, W] of the head
  const float *log_mass, *feature_bias;  // [M], likewise
  int rows;                              // of the split
};

template <class T, int W, int kWarps>
struct DqLayout : BackwardLayout<T, W, kWarps> {
  using S = BackwardLayout<T, W, kWarps>;
  static constexpr int kProjection = 0;
  static constexpr int kMean = kProjection + S::kFeatureBytes;
  static constexpr int kSummed = kMean + S::kFeatureBytes;               // dS
  static constexpr int kQuery = kSummed + S::kSummedBytes;               // [kStages] tiles
  static constexpr int kGradOut = kQuery + S::kStages * S::kTileBytes;   // likewise
  static constexpr int kRowMax = kGradOut + S::kStages * S::kTileBytes;  // float [2][kTile]
  static constexpr int kDelta = kRowMax + 2 * kTile * 4;                 // likewise
  static constexpr int kLogSum = kDelta + 2 * kTile * 4;                 // likewise
  static constexpr int kBlockMax = kLogSum + (kKeepsLogSum<T> ? 2 * kTile * 4 : 0);
  static constexpr int kRowBias = kBlockMax + S::kWarps * 4;  // float [kFeatures]
  static constexpr int kPointers = kRowBias + S::kFeatures * 4;
  static constexpr int kBytes = kPointers + static_cast<int>(sizeof(DqPointers<T>));
  static_assert(kBytes <= S::kMaxBytes);
};

// What one block does, in phases.
template <class T, int W, int kWarps>
struct DqBlock {
  using L = DqLayout<T, W, kWarps>;
  static constexpr int kRowTiles = L::kRowTiles, kThreads = L::kThreads;

  const DqParams<T>& p;
  unsigned char* shared;

  // Sums over tokens of a thread's features: dmean, dw and dlog_mass.
  struct Gradients {
    float mean[kRowTiles][W / 8][4] = {}, projection[kRowTiles][W / 8][4] = {};
    float log_mass[kRowTiles][2] = {};
  };

  PERFORMER_DEVICE T* tile(int offset) const { return reinterpret_cast<T*>(shared + offset); }
  // Of the tiles at `offset`, the one of this parity.
  PERFORMER_DEVICE T* tile(int offset, int parity) const {
    return tile(offset) + (L::kStages == 2 ? parity * kTile * W : 0);
  }
  PERFORMER_DEVICE float* floats(int offset) const {
    return reinterpret_cast<float*>(shared + offset);
  }
  PERFORMER_DEVICE const DqPointers<T>* pointers() const {
    return reinterpret_cast<const DqPointers<T>*>(shared + L::kPointers);
  }
  PERFORMER_DEVICE int heads() const { return static_cast<int>(p.query.heads); }
  PERFORMER_DEVICE int features() const { return static_cast<int>(p.features); }
  PERFORMER_DEVICE static int feature0(int tid) { return tid / 32 * 16 * kRowTiles; }

  // By one thread.
  PERFORMER_DEVICE void StorePointers() const {
    const WorkTile work = GetWorkTile(p.work, blockIdx.x);
    const int64_t head = blockIdx.y, group = head / (heads() / p.groups);
    const int64_t state = (p.state_count == 1 ? 0 : work.sequence) * p.groups + group;
    const int64_t row0 = work.first_row + work.begin, at = row0 * heads() + head;
    *const_cast<DqPointers<T>*>(pointers()) = {
        p.query.Row(row0, head),
        p.grad_out.Row(row0, head),
        StatisticsFrom<T>(p.statistics, at),
        p.grad_query.Row(row0, head),
        p.sum_query == nullptr ? nullptr : p.sum_query + at * W,
        p.projection.At(QueryHeadIndex(p.projection.heads, head, heads(), group), p.features_pad,
                        W),
        p.mean + state * p.features_pad * W,
        p.log_mass + state * p.features,
        p.feature_bias + QueryHeadIndex(p.feature_bias_heads, head, heads(), group) * p.features,
        static_cast<int>(work.end - work.begin)};
  }

  // The projection, mean and row biases of the block's features; visible at [1].
  PERFORMER_DEVICE void LoadFeatures(int first_feature, int tid) const {
    const int left = static_cast<int>(p.features_pad) - first_feature;
    CopyOperand<T, W, L::kFeatures, kThreads>(
        tile(L::kProjection), pointers()->projection + first_feature * W, left, tid);
    CopyOperand<T, W, L::kFeatures, kThreads>(tile(L::kMean), pointers()->mean + first_feature * W,
                                              left, tid);
  }
  PERFORMER_DEVICE void LoadRowBias(int first_feature, int tid) const {
    for (int i = tid; i < L::kFeatures; i += kThreads) {
      const int feature = first_feature + i;
      floats(L::kRowBias)[i] =
          feature < features()
              ? (pointers()->log_mass[feature] + pointers()->feature_bias[feature]) *
                    p.map.inverse_root
              : -kInfinity;
    }
  }

  // Starts copying a tile of queries and grad_out.
  PERFORMER_DEVICE void IssueTile(int number, int parity, int tid) const {
    const int first = number * kTile;
    const auto valid = [&](int r) { return first + r < pointers()->rows; };
    CopyRows<T, W, kTile, kThreads>(tile(L::kQuery, parity), pointers()->query, first, p.query, tid,
                                    valid);
    CopyRows<T, W, kTile, kThreads>(tile(L::kGradOut, parity), pointers()->grad_out, first,
                                    p.grad_out, tid, valid);
    CpAsyncCommit();
    if (tid < kTile)
      LoadStatistics<T>(floats(L::kRowMax), floats(L::kLogSum), floats(L::kDelta),
                        parity * kTile + tid, pointers()->statistics,
                        static_cast<int64_t>(first + tid) * heads(), valid(tid));
  }

  // P and dS of 32 queries from j0; dS to shared memory, both to the sums over tokens. scale: see
  // LogitGradientScale.
  PERFORMER_DEVICE void TakeQueries(Gradients& gradients, int parity, int j0, float scale,
                                    bool linear, int tid) const {
    const int lane = Opaque(tid % 32), t = lane % 4;
    const float unit = p.map.unit();
    const T* const queries = tile(L::kQuery, parity);
    const T* const grad_out = tile(L::kGradOut, parity);
    const float *const row_max = floats(L::kRowMax), *const delta = floats(L::kDelta);
    BackwardTile<kRowTiles> x, ds;
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = parity * kTile + j0 + n * 8 + 2 * t + (i & 1);
        // In float32 log-features are complete before row_max is subtracted: as it was made.
        const float start = kIs16Bit<T> && linear ? -row_max[j] : 0.f, center = -delta[j];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) x[m][n][i] = start, ds[m][n][i] = center;
      }
    FeatureProduct<T, W, kRowTiles>(x, tile(L::kProjection), feature0(tid), queries, j0, lane);
    // Computed again, so that it takes no register before.
    const int own = feature0(Opaque(tid));
    FeatureProduct<T, W, kRowTiles>(ds, tile(L::kMean), own, grad_out, j0, lane);
    if (!linear)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            x[m][n][i] = MappedLogit(p.map, x[m][n][i]);
            if constexpr (kIs16Bit<T>)
              x[m][n][i] -= row_max[parity * kTile + j0 + n * 8 + 2 * t + (i & 1)];
          }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float row_bias = floats(L::kRowBias)[feature0(tid) + m * 16 + lane / 4 + i / 2 * 8];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          float &y = x[m][n][i], &d = ds[m][n][i];
          const int j = parity * kTile + j0 + n * 8 + 2 * t + (i & 1);
          y += row_bias;
          if constexpr (!kIs16Bit<T>) y -= row_max[j];
          y = RowWeight<T>(y, floats(L::kLogSum), j, unit);
          d *= y;
          if constexpr (std::is_same_v<T, Half>) d *= scale;
          gradients.log_mass[m][i / 2] += d;
        }
      }
    SumTokens<T, W, kRowTiles>(gradients.mean, x, grad_out, j0, Opaque(lane));
    if (!linear)
      ChainSlope<T, W, kRowTiles>(ds, p.map, tile(L::kProjection), feature0(tid), queries, j0,
                                  lane);
    StoreSummed<T, kRowTiles>(tile(L::kSummed), ds, feature0(tid), j0, lane);
    SumTokens<T, W, kRowTiles>(gradients.projection, ds, queries, j0, Opaque(lane));
  }

  PERFORMER_DEVICE void StoreGradQuery(int first_feature, int number, float scale, int tid) const {
    const int id = Opaque(tid), lane = id % 32, warp = id / 32, r0 = warp % 4 * 16;
#pragma unroll 1
    for (int i = 0; i < L::kWarpColumns; i += L::kColumns) {
      const int c0 = warp / 4 * L::kWarpColumns + i;
      float dq[L::kColumns / 8][4] = {}, unused[2];
      SumFeatures<T, W, L::kFeatures, L::kColumns, false>(dq, unused, tile(L::kSummed),
                                                          tile(L::kProjection), r0, c0, lane);
      StoreRowGradient<T, W, L::kColumns>(
          pointers()->grad_query, p.grad_query, pointers()->sum_query, dq, p.map.root / scale,
          number * kTile + r0, pointers()->rows, c0, first_feature == 0,
          first_feature + L::kFeatures >= features(), lane);
    }
  }

  // The sums over tokens.
  PERFORMER_DEVICE void StoreGradients(const Gradients& gradients, int first_feature, float scale,
                                       int tid) const {
    const int lane = tid % 32;
    const int64_t part = static_cast<int64_t>(blockIdx.x) * heads() + blockIdx.y;
    const float factor = 1.f / scale;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int feature = first_feature + feature0(tid) + m * 16 + lane / 4 + 8 * e;
        const float sum = QuadSum(gradients.log_mass[m][e]) * factor;
        if (lane % 4 == 0 && feature < features())
          p.part_log_mass[part * features() + feature] = sum;
      }
    StoreSums<W, kRowTiles>(p.part_mean + part * features() * p.grad_out.width, p.grad_out.width,
                            features(), first_feature + feature0(tid), gradients.mean, 1.f, lane);
    StoreSums<W, kRowTiles>(p.part_projection + part * features() * p.query.width, p.query.width,
                            features(), first_feature + feature0(tid), gradients.projection,
                            p.map.root * factor, lane);
  }
};

template <class T, int W, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 1) DqKernel(DqParams<T> p) {
  using Block = DqBlock<T, W, kWarps>;
  using L = typename Block::L;
  PERFORMER_SHARED_MEMORY(shared);
  const Block block = {p, shared};
  const int tid = threadIdx.x;
  if (tid == 0) block.StorePointers();
  __syncthreads();  // the pointers are visible
  const auto* pointers = block.pointers();
  const int tiles = static_cast<int>(CeilDiv(pointers->rows, kTile));
  const bool linear = p.map.linear();
  float scale = 1;
  if constexpr (std::is_same_v<T, Half>)
    scale = LogitGradientScale<T>(
        BlockMax<kWarps>(p.peak + (pointers->statistics.row_max - p.statistics.row_max),
                         block.heads(), pointers->rows, block.floats(L::kBlockMax), tid));

  const int features = block.features();
#pragma unroll 1
  for (int first_feature = 0; first_feature < features; first_feature += L::kFeatures) {
    __syncthreads();  // nobody reads the last features any more
    block.LoadFeatures(first_feature, tid);
    if (L::kStages == 2) block.IssueTile(0, 0, tid);
    typename Block::Gradients gradients;
    block.LoadRowBias(first_feature, tid);
#pragma unroll 1
    for (int number = 0; number < tiles; ++number) {
      const int parity = number & 1;
      // Nobody reads a tile after its [2].
      if constexpr (L::kStages == 1) block.IssueTile(number, parity, tid);
      CpAsyncWait<0>();
      __syncthreads();  // [1] the tile is complete; the other buffers and dS are free
      if (L::kStages == 2 && number + 1 < tiles) block.IssueTile(number + 1, parity ^ 1, tid);
#pragma unroll 1
      for (int j0 = 0; j0 < kTile; j0 += 32)
        block.TakeQueries(gradients, parity, j0, scale, linear, tid);
      __syncthreads();  // [2] dS is visible
      block.StoreGradQuery(first_feature, number, scale, tid);
    }
    block.StoreGradients(gradients, first_feature, scale, tid);
  }
}

}  // namespace cuda
}  // namespace performer
