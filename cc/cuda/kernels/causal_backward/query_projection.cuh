// Gradient of causal attention with respect to the projection of queries and to feature_bias, only
// where it is asked for. A block has 64 features of a split, and walks the split's tiles:
//
//   dG, keys            as for the gradient of queries (query_gradient.cuh), with the same roundings
//   queries             f = exp(w q + anchor - lse)      da = f (x - delta z)      to shared memory
//   over tokens         dw += root (da slope)^T q        dfeature_bias += da^T 1
//
// A warp has 16 query rows of a tile, then 16 features in the sums over tokens. These are partial
// results of a split and head, for backward/sum_partials.cuh.
//
// Grid: (splits of all sequences, query heads, slices of feature blocks).
#pragma once
#include "cuda/kernels/causal_backward/tile_gradient.cuh"

namespace performer {
namespace cuda {

template <class T>
struct CausalQueryProjectionParams : CausalTileGradientParams<T> {
  RowStatistics statistics;            // [B L, H], of CausalQueryGradientKernel
  float* part_feature_bias = nullptr;  // [splits, H, M]
  float* part_projection = nullptr;    // [splits, H, M, D]
};

template <class T, int W>
struct CausalQueryProjectionLayout : CausalTileGradientLayout<T, W> {
  using S = CausalTileGradientLayout<T, W>;
  using Pointers = CausalTileGradientPointers<T>;

  // Shared memory, in bytes.
  static constexpr int kState = S::kProjection + S::kFeatureBytes;  // [kFeatures][W]
  // Whether values are in its place first.
  static constexpr bool kStateIsLate = S::kSharesRows || !kIs16Bit<T>;
  static constexpr int kValue = kState + (kStateIsLate ? 0 : S::kFeatureBytes);
  static constexpr int kRangedQuery =
      kHasRanged<T> ? kValue : S::kQuery;                  // when values are done with
  static constexpr int kWeights = kValue + S::kTileBytes;  // kb [kFeatures][kTile]
  static constexpr int kGradients = kWeights;              // then da [kTile][kFeatures]
  static constexpr int kAnchor = kWeights + S::kFeatures * kTile * S::kSize;  // float [kFeatures]
  static constexpr int kMass = kAnchor + S::kFeatures * 4;  // float [kMassRows][kFeatures]
  static constexpr int kShares = kMass + S::kMassRows * S::kFeatures * 4;    // float2 [kFeatures]
  static constexpr int kRowMax = kShares + S::kFeatures * 8;                 // float [kTile]
  static constexpr int kDelta = kRowMax + kTile * 4;                         // likewise
  static constexpr int kLogSum = kDelta + kTile * 4;                         // likewise
  static constexpr int kCuts = kLogSum + (kKeepsLogSum<T> ? kTile * 4 : 0);  // int [kWarps]
  static constexpr int kStream = kCuts + S::kWarps * 4;
  static constexpr int kPointers = kStream + KeyStream<T, W, S::kThreads>::kSharedBytes;
  static constexpr int kBytes = kPointers + static_cast<int>(sizeof(Pointers));
  static_assert(kStream % 8 == 0 && kPointers % 8 == 0 && kBytes <= MaxSharedBytes(W, S::kWarps));
};

template <class T, int W>
struct CausalQueryProjectionBlock
    : CausalTileGradientBlock<T, W, CausalQueryProjectionLayout<T, W>,
                              CausalQueryProjectionParams<T>, CausalTileGradientPointers<T>> {
  using Base =
      CausalTileGradientBlock<T, W, CausalQueryProjectionLayout<T, W>,
                              CausalQueryProjectionParams<T>, CausalTileGradientPointers<T>>;
  using Base::Base, Base::kStep;
  using Base::p, Base::tile, Base::ranged, Base::floats, Base::pointers;
  using typename Base::L, typename Base::R, typename Base::Step, typename Base::Pairs;
  static constexpr int kSteps = L::kFeatures / kStep;
  static constexpr int kColumns = kSlice<W> / 8;  // accumulators of 16 features

  PERFORMER_DEVICE static int begin() { return SliceBegin<W>(blockIdx.z); }

  // Sums over tokens of 16 features.
  struct Gradients {
    float projection[1][kColumns][4] = {}, bias[2] = {};
  };

  // da of the warp's rows from row0 on that lie in the sub-chunk [begin, end); of the others it stays
  // as it is. `rows`: of the tile.
  PERFORMER_DEVICE void Queries(Step (&da)[kSteps], const Pairs& pairs, int row0, int rows,
                                int begin, int end, int lane) const {
    const float unit = p.map.unit();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      lane = Opaque(lane);
      const int g = lane / 4, first = step * kStep;
      const T* const projection = tile(L::kProjection) + first * W;
      Step f, x, z;
      Base::TakeQueries(row0, rows, lane);
      Base::QueryProduct(f, projection, floats(L::kAnchor) + first, row0, lane);
      Base::TakeGradOut(row0, rows, lane);
      Base::Gains(x, z, pairs, ranged(L::kState) + first * W, first, row0, lane);
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = row0 + g + 8 * (i / 2);
          if (Base::IsHidden(i, row0, begin, end, lane)) continue;
          const float weight =
              RowWeight<T>(f[n][i] - floats(L::kRowMax)[row], floats(L::kLogSum), row, unit);
          const float y = weight * (x[n][i] - floats(L::kDelta)[row] * z[n][i]);
          da[step][n][i] = weight == 0.f ? 0.f : y;
        }
    }
  }

  // da to shared memory, where the tile's kb is done with.
  PERFORMER_DEVICE void StoreGradients(const Step (&da)[kSteps], int row0, int lane) const {
    lane = Opaque(lane);
    R* const to = ranged(L::kGradients);
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          StorePair(to + At<R, L::kFeatures>(row0 + lane / 4 + 8 * e,
                                             step * kStep + n * 8 + 2 * (lane % 4)),
                    da[step][n][2 * e], da[step][n][2 * e + 1]);
  }

  // dw and, with kBias, dfeature_bias of the warp's features take the tile.
  template <bool kBias, bool kProjection>
  PERFORMER_DEVICE void SumTile(Gradients& gradients, int feature0, int lane) const {
    lane = Opaque(lane);
#pragma unroll(kUnroll<R>)
    for (int s = 0; s < kTile / 16; ++s) {
      uint32_t a[kFragment<R>];
      LoadATrans<R, L::kFeatures>(a, ranged(L::kGradients), feature0, s * 16, lane);
      if constexpr (kBias)
#pragma unroll
        for (int e = 0; e < 2; ++e) gradients.bias[e] += OperandSum<R>(a, e);
      if constexpr (kProjection)
#pragma unroll
        for (int n = 0; n < kColumns / 2; ++n) {
          uint32_t b[kFragment<R>];
          LoadBTrans<R, W>(b, ranged(L::kRangedQuery), s * 16, begin() + n * 16, lane);
          Mma<R>(gradients.projection[0][2 * n], gradients.projection[0][2 * n + 1], a, b);
        }
    }
  }

  // Maps that are not linear: da is multiplied by the slopes.
  PERFORMER_DEVICE void Chain(Step (&da)[kSteps], int row0, int lane) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      Step slope;
      Base::Slopes(slope, tile(L::kProjection) + step * kStep * W, row0, lane);
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) da[step][n][i] *= slope[n][i];
    }
  }

  PERFORMER_DEVICE void Store(const Gradients& gradients, int first, int warp, int lane) const {
    const int features = static_cast<int>(p.features), feature0 = first + warp * 16;
    const int64_t part = static_cast<int64_t>(blockIdx.x) * p.query.heads + blockIdx.y;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int feature = feature0 + lane / 4 + 8 * e;
      const float all = QuadSum(gradients.bias[e]);
      if (begin() == 0 && lane % 4 == 0 && feature < features)
        p.part_feature_bias[part * features + feature] = all;
    }
    StoreSums(p.part_projection + part * features * p.query.width, p.query.width, features,
              feature0, gradients.projection, p.map.root, begin(), lane);
  }
};

template <class T, int W>
__global__ void __launch_bounds__(128, 2)
    CausalQueryProjectionKernel(CausalQueryProjectionParams<T> p) {
  using Block = CausalQueryProjectionBlock<T, W>;
  using L = typename Block::L;
  constexpr int kThreads = L::kThreads;
  PERFORMER_SHARED_MEMORY(shared);
  const int tid = threadIdx.x;
  // From a shuffle, so that branches on it are known to be the same for the whole warp.
  const int warp = __shfl_sync(kAllLanes, tid / 32, 0), lane = tid % 32, row0 = warp * 16;
  const Block block(p, shared);
  const WorkTile split = GetWorkTile(p.splits, blockIdx.x);
  const int first = static_cast<int>(blockIdx.z / kSlices<W>) * L::kFeatures;
  const int64_t first_tile = FirstWorkTile(p.work, split.sequence) + split.begin / kTile;
  const int64_t tiles = CeilDiv(split.end - split.begin, kTile);
  typename Block::Gradients gradients;

#pragma unroll 1
  for (int64_t i = 0; i < tiles; ++i) {
    const WorkTile work = GetWorkTile(p.work, first_tile + i);
    if (tid == 0)  // the sums over tokens of the last tile read no pointers
      *block.pointers() =
          MakeCausalTileGradientPointers<T, W>(p, work, first_tile + i, RowsOf<T>());
    KeyStream<T, W, kThreads> stream(p.keys, p.map, work, blockIdx.y / (p.query.heads / p.groups),
                                     shared + L::kStream, tid);
    block.LoadMasks(stream, tid);
    __syncthreads();  // the mask of the keys is visible
    const int rows = stream.pointers->rows;
    block.IssueRows(rows, tid);
    block.IssueKeys(stream, tid);
    if (i == 0)
      CopyOperand<T, W, L::kFeatures, kThreads>(
          block.tile(L::kProjection),
          block.pointers()->projection + static_cast<int64_t>(first) * W, tid);
    if constexpr (!L::kStateIsLate) block.IssueState(block.tile(L::kState), first, tid);
    CpAsyncCommit();
    if (tid < kTile)
      LoadStatistics<T>(block.floats(L::kRowMax), block.floats(L::kLogSum), block.floats(L::kDelta),
                        tid, p.statistics, block.pointers()->line + tid * p.query.heads,
                        tid < rows);
    typename Block::Features own;
    block.Load(own, first + warp * 16, lane);
    CpAsyncWait<0>();
    block.FinishKeys(stream, tid);
    block.MakeRowsRanged(tid);
    __syncthreads();  // the rows are complete
    typename Block::Pairs pairs;
    block.PairGradients(pairs, row0, lane);
    if constexpr (L::kStateIsLate) {
      __syncthreads();  // values are done with
      block.IssueState(block.tile(L::kState), first, tid);
      CpAsyncCommit();
      CpAsyncWait<0>();
      __syncthreads();  // the state is complete
    }

    typename Block::Step da[Block::kSteps] = {};
    block.WalkSubChunks(
        block.tile(L::kState), own, stream.bias, rows, first, warp, lane,
        [&](int begin, int end) { block.Queries(da, pairs, row0, rows, begin, end, lane); });
    __syncthreads();  // kb, which the gradients take the place of, is done with
    block.TakeQueries(row0, rows, lane);
    if constexpr (L::kSharesRows)
      MakeRanged<T, W, 16, 32>(block.ranged(L::kRangedQuery) + row0 * W,
                               block.tile(L::kQuery) + row0 * W, lane);
    else
      MakeRanged<T, W, kTile, kThreads>(block.ranged(L::kRangedQuery), block.tile(L::kQuery), tid);
    block.StoreGradients(da, row0, lane);
    __syncthreads();  // da is visible
    if (p.map.linear()) {
      block.template SumTile<true, true>(gradients, row0, lane);
    } else {
      block.template SumTile<true, false>(gradients, row0, lane);
      block.Chain(da, row0, lane);
      __syncthreads();  // da may be overwritten
      block.StoreGradients(da, row0, lane);
      __syncthreads();  // da slope is visible
      block.template SumTile<false, true>(gradients, row0, lane);
    }
  }
  block.Store(gradients, first, warp, lane);
}

}  // namespace cuda
}  // namespace performer
