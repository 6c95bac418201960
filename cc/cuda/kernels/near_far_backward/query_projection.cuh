// Gradient of near-and-far attention with respect to the projection of queries and to feature_bias,
// only where it is asked for. A block has 64 features of a split of positions, and walks its tiles
// of queries:
//
//   f = exp(a + log_mass - lse)      da = f (mean grad_out^T - delta)
//   dw += root da q                  dfeature_bias += da 1
//
// A warp has 16 features. These are partial results of a split and head, for
// backward/sum_partials.cuh.
//
// Grid: (splits of all sequences, query heads, slices of feature blocks).
#pragma once
#include "cuda/kernels/near_far_backward/common.cuh"

namespace performer {
namespace cuda {

template <class T>
struct NearFarQueryProjectionParams : NearFarStepsParams<T> {
  RowsOf<const T> grad_out;            // [B L, H, E]
  RowStatistics statistics;            // [B L, H], of log-features
  float* part_feature_bias = nullptr;  // [splits, H, M]
  float* part_projection = nullptr;    // [splits, H, M, D]
};

template <class T, int W, bool kBoth>
struct NearFarQueryProjectionLayout {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static_assert(kTile == 16 * kWarps && kTile == kFeatureUnit, "a warp has 16 features");
  static constexpr int kStages = 1;
  static constexpr bool kCopiesBehind = W * sizeof(T) <= 256;
  static constexpr int kBiases = 1;

  // Shared memory, in bytes.
  static constexpr int kTileBytes = kTile * W * static_cast<int>(sizeof(T));
  static constexpr int kQuery = 0;
  static constexpr int kGradOut = kTileBytes;
  static constexpr int kColumns = kGradOut + kTileBytes;
  static constexpr int kValues = kColumns + kTileBytes;
  static constexpr int kBehind = kValues + kTileBytes;
  static constexpr int kShares = kBehind + (kBoth && kCopiesBehind ? kTileBytes : 0);
  static constexpr int kBias = kShares + 2 * kTile * 16;
  static constexpr int kRowMax = kBias + kTile * 4;  // float [kTile] each
  static constexpr int kDelta = kRowMax + kTile * 4;
  static constexpr int kLogSum = kDelta + kTile * 4;
  static constexpr int kPointers = kLogSum + (kKeepsLogSum<T> ? kTile * 4 : 0);
  static constexpr int kBytes = kPointers + static_cast<int>(sizeof(NearFarPointers<T>));
  static_assert(kPointers % 8 == 0 && kBytes <= MaxSharedBytes(W, kWarps));
};

template <class T, int W, bool kBoth>
struct NearFarQueryProjectionBlock
    : NearFarSteps<T, W, kBoth, NearFarQueryProjectionLayout<T, W, kBoth>,
                   NearFarQueryProjectionParams<T>> {
  using L = NearFarQueryProjectionLayout<T, W, kBoth>;
  using Base = NearFarSteps<T, W, kBoth, L, NearFarQueryProjectionParams<T>>;
  using Base::p, Base::tile, Base::floats, Base::pointers;
  using R = Ranged<T>;
  static constexpr int kQueries = W * sizeof(T) <= 256 ? 32 : 16;  // of a tile, at a time

  // Sums over tokens of 16 features.
  struct Sums {
    float projection[1][kSlice<W> / 8][4] = {}, bias[2] = {};
  };

  PERFORMER_DEVICE static int begin() { return SliceBegin<W>(blockIdx.z); }

  PERFORMER_DEVICE void IssueRows(int tid) const {
    const int begin = pointers().begin, end = pointers().end;
    const auto valid = [&](int r) { return r >= begin && r < end; };
    CopyRows<T, W, kTile, L::kThreads>(tile(L::kQuery), pointers().query, -begin, p.query, tid,
                                       valid);
    CopyRows<T, W, kTile, L::kThreads>(tile(L::kGradOut),
                                       p.grad_out.Row(pointers().row, blockIdx.y), -begin,
                                       p.grad_out, tid, valid);
    if (tid < kTile)
      LoadStatistics<T>(floats(L::kRowMax), floats(L::kLogSum), floats(L::kDelta), tid,
                        p.statistics, (pointers().row + tid - begin) * p.query.heads + blockIdx.y,
                        valid(tid));
  }

  // kQueries of the tile, from j0 on.
  PERFORMER_DEVICE void TakeQueries(Sums& sums, const float* bias, int j0, int row0,
                                    int lane) const {
    const int g = lane / 4, t = lane % 4;
    const float of_row[2] = {bias[row0 + g], bias[row0 + g + 8]};
    BackwardTile<1, kQueries> f = {}, x;
    FeatureProduct<T, W, 1, kQueries>(f, tile(L::kColumns), row0, tile(L::kQuery), j0, lane);
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = j0 + n * 8 + 2 * t + (i & 1);
        f[0][n][i] = RowWeight<T>(f[0][n][i] + (of_row[i / 2] - floats(L::kRowMax)[j]),
                                  floats(L::kLogSum), j, p.map.unit());
        x[0][n][i] = -floats(L::kDelta)[j];
      }
    FeatureProduct<T, W, 1, kQueries>(x, tile(L::kValues), row0, tile(L::kGradOut), j0, lane);
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[0][n][i] = f[0][n][i] == 0.f ? 0.f : f[0][n][i] * x[0][n][i];
        sums.bias[i / 2] += x[0][n][i];
      }
    SumRangedTokens<T, W, kQueries>(sums.projection, x, tile(L::kQuery), j0, begin(), lane);
  }

  PERFORMER_DEVICE void Store(const Sums& sums, int first, int row0, int lane) const {
    const int features = static_cast<int>(p.features);
    const int64_t part = static_cast<int64_t>(blockIdx.x) * p.query.heads + blockIdx.y;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int feature = first + row0 + lane / 4 + 8 * e;
      const float all = QuadSum(sums.bias[e]);
      if (begin() == 0 && lane % 4 == 0 && feature < features)
        p.part_feature_bias[part * features + feature] = all;
    }
    StoreSums(p.part_projection + part * features * p.query.width, p.query.width, features,
              first + row0, sums.projection, p.map.root, begin(), lane);
  }
};

template <class T, int W, bool kBoth>
__global__ void __launch_bounds__(128, 2)
    NearFarQueryProjectionKernel(NearFarQueryProjectionParams<T> p) {
  using Block = NearFarQueryProjectionBlock<T, W, kBoth>;
  PERFORMER_SHARED_MEMORY(shared);
  const int tid = threadIdx.x, lane = tid % 32, row0 = tid / 32 * 16;
  const Block block = {{p, shared}};
  const WorkTile split = GetWorkTile(p.geometry.splits, blockIdx.x);
  const int64_t window = p.geometry.window, tiles = CeilDiv(window, kTile);
  const int64_t first_block = FirstWorkTile(p.geometry.blocks, split.sequence);
  const int64_t first = (first_block + split.begin / window) * tiles;
  const int64_t end = (first_block + CeilDiv(split.end, window)) * tiles;
  const int step = static_cast<int>(blockIdx.z / kSlices<W>);
  typename Block::Sums sums;

#pragma unroll 1
  for (int64_t number = first; number < end; ++number) {
    if (number > first) __syncthreads();  // nobody reads the last tile any more
    if (tid == 0) block.pointers() = MakeNearFarPointers<T, W>(p, number, blockIdx.y);
    __syncthreads();  // the pointers are visible
    if (block.pointers().begin == block.pointers().end) continue;
    typename Block::Base::Column column;
    block.Load(column, step, tid);
    block.Base::Store(column, step, tid);
    block.IssueRows(tid);
    block.Issue(step, tid);
    CpAsyncWait<0>();
    __syncthreads();  // the shares are visible, and rows
    block.MergeFar(step, tid);
    __syncthreads();  // the means are complete
#pragma unroll 1
    for (int j0 = 0; j0 < block.pointers().end; j0 += Block::kQueries)
      block.TakeQueries(sums, block.bias(step), j0, row0, Opaque(lane));
  }
  block.Store(sums, step * kTile, row0, lane);
}

}  // namespace cuda
}  // namespace performer
