// Gradient of Read:
//
//   P[m, i] = softmax_m(a + log_mass)     g = mean . grad_out_i     delta_i = sum_m P g
//   dS = P (g - delta_i)
//   over tokens     dmean = P grad_out          dlog_mass = dS 1     dw = root (dS slope) q
//   over features   dq = root (dS slope)^T w
//
// A block that has all features knows the softmax of a row itself (backward/block_softmax.cuh). One
// that takes them a feature block at a time needs the statistics of each row beforehand
// (backward/row_statistics.cuh). dw is computed only where it is asked for.
//
// Grid: (splits of all sequences, query heads, slices). Sums over tokens are partial results of a
// split and head, for backward/sum_partials.cuh.
#pragma once
#include "cuda/kernels/backward/block_softmax.cuh"
#include "cuda/kernels/backward/common.cuh"

namespace performer {
namespace cuda {

template <class T>
struct DqParams : StateReadParams<T> {
  RowsOf<const T> grad_out;  // [B L, H, E]
  // [B L, H] each, of RowStatisticsKernel, for a block that does not have all features.
  RowStatistics statistics;
  const float* peak = nullptr;
  RowsOf<T> grad_query;        // [B L, H, D]
  float* sum_query = nullptr;  // [B L, H, W], if a block cannot hold all features, else nullptr
  // [splits, H, M], [splits, H, M, E] and [splits, H, M, D]; the last one if it is asked for.
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

// kAllFeatures: the block has all features. kDw: dw is asked for.
template <class T, int W, int kWarps, bool kAllFeatures, bool kDw>
struct DqLayout : BackwardLayout<T, W, kWarps> {
  using S = BackwardLayout<T, W, kWarps>;
  static constexpr int kProjection = 0;
  static constexpr int kMean = kProjection + S::kFeatureBytes;
  static constexpr int kSummed = kMean + S::kFeatureBytes;              // dS
  static constexpr int kQuery = kSummed + S::kSummedBytes;              // [kStages] tiles
  static constexpr int kGradOut = kQuery + S::kStages * S::kTileBytes;  // likewise
  static constexpr int kSoftmax = kGradOut + S::kStages * S::kTileBytes;
  // Statistics of rows, as given: float [2][kTile] each.
  static constexpr int kRowMax = kSoftmax;
  static constexpr int kDelta = kRowMax + 2 * kTile * 4;
  static constexpr int kLogSum = kDelta + 2 * kTile * 4;
  static constexpr int kBlockMax = kLogSum + (kKeepsLogSum<T> ? 2 * kTile * 4 : 0);
  static constexpr int kRowBias =  // float [kFeatures]
      kAllFeatures ? kSoftmax + BlockSoftmax<kWarps, true>::kBytes : kBlockMax + S::kWarps * 4;
  static constexpr int kPointers = kRowBias + S::kFeatures * 4;
  static constexpr int kBytes = kPointers + static_cast<int>(sizeof(DqPointers<T>));
  static_assert(kBytes <= S::kMaxBytes);
};

// What one block does, in phases.
template <class T, int W, int kWarps, bool kAllFeatures, bool kDw>
struct DqBlock {
  using L = DqLayout<T, W, kWarps, kAllFeatures, kDw>;
  static constexpr int kRowTiles = L::kRowTiles, kThreads = L::kThreads;

  const DqParams<T>& p;
  unsigned char* shared;

  // Sums over tokens of a thread's features: dmean, dw and dlog_mass.
  struct Gradients {
    float mean[kRowTiles][kSlice<W> / 8][4] = {}, projection[kRowTiles][kSlice<W> / 8][4] = {};
    float log_mass[kRowTiles][2] = {};
  };

  // Half: what dS is multiplied by, see LogitGradientScale. A block that has all features learns the
  // largest |g| query by query, and the scale falls with it.
  struct Scale {
    float now = std::is_same_v<T, Half> ? 0x1p66f : 1.f;
    float of_first_half = 1;  // of dS of the first 32 queries in the tile

    PERFORMER_DEVICE void Lower(float largest) {
      if (largest != 0.f) now = fminf(now, LogitGradientScale<T>(largest));
    }
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
  PERFORMER_DEVICE static int begin() { return SliceBegin<W>(blockIdx.z); }

  // By one thread.
  PERFORMER_DEVICE void StorePointers() const {
    const WorkTile work = GetWorkTile(p.work, blockIdx.x);
    const int64_t head = blockIdx.y, group = head / (heads() / p.groups);
    const int64_t state = (p.state_count == 1 ? 0 : work.sequence) * p.groups + group;
    const int64_t row0 = work.first_row + work.begin, at = row0 * heads() + head;
    *const_cast<DqPointers<T>*>(pointers()) = {
        p.query.Row(row0, head),
        p.grad_out.Row(row0, head),
        kAllFeatures ? RowStatistics() : StatisticsFrom<T>(p.statistics, at),
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
    if (!kAllFeatures && tid < kTile)
      LoadStatistics<T>(floats(L::kRowMax), floats(L::kLogSum), floats(L::kDelta),
                        parity * kTile + tid, pointers()->statistics,
                        static_cast<int64_t>(first + tid) * heads(), valid(tid));
  }

  // P and dS of 32 queries from j0; dS to shared memory, both to the sums over tokens.
  PERFORMER_DEVICE void TakeQueries(Gradients& gradients, Scale& scale, int number, int j0,
                                    bool linear, int tid) const {
    const int parity = number & 1;
    int lane = Opaque(tid % 32);
    BackwardTile<kRowTiles> x, ds;
    if constexpr (kAllFeatures) {
      BlockWeights(x, ds, gradients, scale, number, j0, linear, tid);
      lane = Opaque(tid % 32);  // computed again, so that it takes no register before
    } else {
      RowWeights(x, ds, gradients, scale, parity, j0, linear, lane, tid);
    }
    const T* const queries = tile(L::kQuery, parity);
    const T* const grad_out = tile(L::kGradOut, parity);
    SumTokens<T, W, kRowTiles>(gradients.mean, x, grad_out, j0, begin(), Opaque(lane));
    if (!linear)
      ChainSlope<T, W, kRowTiles>(ds, p.map, tile(L::kProjection), feature0(tid), queries, j0,
                                  lane);
    StoreSummed<T, kRowTiles>(tile(L::kSummed), ds, feature0(tid), j0, lane);
    if constexpr (kDw)
      SumTokens<T, W, kRowTiles>(gradients.projection, ds, queries, j0, begin(), Opaque(lane));
  }

  // x += w q and g += mean . grad_out.
  PERFORMER_DEVICE void Products(BackwardTile<kRowTiles>& x, BackwardTile<kRowTiles>& g, int parity,
                                 int j0, int lane, int tid) const {
    FeatureProduct<T, W, kRowTiles>(x, tile(L::kProjection), feature0(tid), tile(L::kQuery, parity),
                                    j0, lane);
    // Computed again, so that it takes no register before.
    const int own = feature0(Opaque(tid));
    FeatureProduct<T, W, kRowTiles>(g, tile(L::kMean), own, tile(L::kGradOut, parity), j0, lane);
  }

  // P and dS of a block that has all features.
  PERFORMER_DEVICE void BlockWeights(BackwardTile<kRowTiles>& x, BackwardTile<kRowTiles>& ds,
                                     Gradients& gradients, Scale& scale, int number, int j0,
                                     bool linear, int tid) const {
    const int lane = Opaque(tid % 32), parity = number & 1;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[m][n][i] = ds[m][n][i] = 0.f;
    Products(x, ds, parity, j0, lane, tid);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float row_bias = floats(L::kRowBias)[feature0(tid) + m * 16 + lane / 4 + i / 2 * 8];
#pragma unroll
        for (int n = 0; n < 4; ++n)
          x[m][n][i] = (linear ? x[m][n][i] : MappedLogit(p.map, x[m][n][i])) + row_bias;
      }
    BlockSoftmax<kWarps, std::is_same_v<T, Half>> softmax(shared + L::kSoftmax, j0 / 32);
    softmax.template TakeFeatures<kRowTiles>(x, ds, p.map.unit(), tid);
    __syncthreads();  // [3] what all warps have of these queries is visible
    softmax.Combine(number * kTile + j0, pointers()->rows, p.map.unit(), tid);
    if constexpr (std::is_same_v<T, Half>) {
      const float before = scale.now;
      scale.Lower(softmax.Peak());
      if (j0 == 0) scale.of_first_half = scale.now;
      if (kDw && scale.now != before)
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int n = 0; n < kSlice<W> / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) gradients.projection[m][n][i] *= scale.now / before;
    }
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float factor = softmax.Factor(n, c, lane), delta = softmax.Delta(n, c, lane);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float &y = x[m][n][2 * e + c], &d = ds[m][n][2 * e + c];
            y *= factor;
            d = (d - delta) * y;
            gradients.log_mass[m][e] += d;
            if constexpr (std::is_same_v<T, Half>) d *= scale.now;
          }
      }
  }

  // P and dS by the statistics of rows.
  PERFORMER_DEVICE void RowWeights(BackwardTile<kRowTiles>& x, BackwardTile<kRowTiles>& ds,
                                   Gradients& gradients, const Scale& scale, int parity, int j0,
                                   bool linear, int lane, int tid) const {
    const int t = lane % 4;
    const float unit = p.map.unit();
    const float *const row_max = floats(L::kRowMax), *const delta = floats(L::kDelta);
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
    Products(x, ds, parity, j0, lane, tid);
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
          gradients.log_mass[m][i / 2] += d;
          if constexpr (std::is_same_v<T, Half>) d *= scale.now;
        }
      }
  }

  PERFORMER_DEVICE void StoreGradQuery(int first_feature, int number, const Scale& scale,
                                       int tid) const {
    const int id = Opaque(tid), lane = id % 32, warp = id / 32, r0 = warp % 4 * 16;
#pragma unroll 1
    for (int i = 0; i < L::kWarpColumns; i += L::kColumns) {
      const int c0 = begin() + warp / 4 * L::kWarpColumns + i;
      float dq[L::kColumns / 8][4] = {}, unused[2];
      SumFeatures<T, W, L::kFeatures, L::kColumns, false>(dq, unused, tile(L::kSummed),
                                                          tile(L::kProjection), r0, c0, lane);
      StoreRowGradient<T, W, L::kColumns>(
          pointers()->grad_query, p.grad_query, pointers()->sum_query, dq,
          p.map.root / (r0 < 32 ? scale.of_first_half : scale.now), number * kTile + r0,
          pointers()->rows, c0, first_feature == 0, first_feature + L::kFeatures >= features(),
          lane);
    }
  }

  // The sums over tokens.
  PERFORMER_DEVICE void StoreGradients(const Gradients& gradients, int first_feature, float scale,
                                       int tid) const {
    const int lane = tid % 32;
    const int64_t part = static_cast<int64_t>(blockIdx.x) * heads() + blockIdx.y;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int feature = first_feature + feature0(tid) + m * 16 + lane / 4 + 8 * e;
        const float sum = QuadSum(gradients.log_mass[m][e]);
        if (begin() == 0 && lane % 4 == 0 && feature < features())
          p.part_log_mass[part * features() + feature] = sum;
      }
    StoreSums(p.part_mean + part * features() * p.grad_out.width, p.grad_out.width, features(),
              first_feature + feature0(tid), gradients.mean, 1.f, begin(), lane);
    if constexpr (kDw)
      StoreSums(p.part_projection + part * features() * p.query.width, p.query.width, features(),
                first_feature + feature0(tid), gradients.projection, p.map.root / scale, begin(),
                lane);
  }
};

template <class T, int W, int kWarps, bool kAllFeatures, bool kDw>
__global__ void __launch_bounds__(32 * kWarps, 1) DqKernel(DqParams<T> p) {
  using Block = DqBlock<T, W, kWarps, kAllFeatures, kDw>;
  using L = typename Block::L;
  PERFORMER_SHARED_MEMORY(shared);
  const Block block = {p, shared};
  const int tid = threadIdx.x;
  if (tid == 0) block.StorePointers();
  __syncthreads();  // the pointers are visible
  const auto* pointers = block.pointers();
  const int tiles = static_cast<int>(CeilDiv(pointers->rows, kTile));
  const bool linear = p.map.linear();
  typename Block::Scale scale;
  if constexpr (std::is_same_v<T, Half> && !kAllFeatures) {
    scale.Lower(BlockMax<kWarps>(p.peak + (pointers->statistics.row_max - p.statistics.row_max),
                                 block.heads(), pointers->rows, block.floats(L::kBlockMax), tid));
    scale.of_first_half = scale.now;
  }

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
        block.TakeQueries(gradients, scale, number, j0, linear, tid);
      __syncthreads();  // [2] dS is visible
      block.StoreGradQuery(first_feature, number, scale, tid);
    }
    block.StoreGradients(gradients, first_feature, scale.now, tid);
  }
}

}  // namespace cuda
}  // namespace performer
