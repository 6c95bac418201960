// Gradient of causal attention with respect to the projection of keys, where it is asked for:
//
//   dw = root sum over keys of (db slope) k
//
// with db as in causal_backward/dkv.cuh. A block has 32 features and walks the tiles of a split; it
// computes db of these features once more. Grid: (splits of all sequences times feature blocks,
// key/value heads). The results are partial sums of a split, for backward/sum_partials.cuh.
#pragma once
#include "cuda/kernels/causal_backward/key_gradients.cuh"

namespace performer {
namespace cuda {

template <class T, int W>
struct CausalKeyProjectionLayout : CausalKeyLayout<T, W> {
  using S = CausalKeyLayout<T, W>;
  // db slope [kFeatures][kTile], when queries are done with
  static constexpr int kKeyFeatures = S::kQuery;
  static_assert(kTile <= W);
  // Where there is no room for keys in bfloat16 beside those in half, they take their place.
  static constexpr bool kConvertsKeys = kHasRanged<T> && W > 128;
  static constexpr bool kHasBoth = kHasRanged<T> && !kConvertsKeys;
  static constexpr int kRangedKey = kHasBoth ? (S::kBytes + 15) / 16 * 16 : S::kKey;
  static constexpr int kBytes = kHasBoth ? kRangedKey + S::kTileBytes : S::kBytes;
  static_assert(kBytes <= MaxSharedBytes(W, S::kWarps));
};

template <class T, int W>
__global__ void __launch_bounds__(128, 1) CausalKeyProjectionKernel(CausalDkvParams<T> p) {
  using Block = CausalKeyGradients<T, W>;
  using L = CausalKeyProjectionLayout<T, W>;
  using R = Ranged<T>;
  constexpr int kColumns = W / 2;  // of a warp, which has 16 features
  PERFORMER_SHARED_MEMORY(shared);
  const int tid = threadIdx.x;
  const int warp = __shfl_sync(kAllLanes, tid / 32, 0), lane = tid % 32, row0 = warp * 16;
  const Block block = {{{p, shared, static_cast<int64_t>(blockIdx.y)}}};
  R* const key_features = block.ranged(L::kKeyFeatures);
  int* const any_steep = reinterpret_cast<int*>(shared + L::kSteep);
  const int64_t split_number = blockIdx.x / p.feature_blocks;
  const int first = static_cast<int>(blockIdx.x % p.feature_blocks) * L::kFeatures;
  const WorkTile split = GetWorkTile(p.splits, split_number);
  const int64_t first_tile = FirstWorkTile(p.work, split.sequence) + split.begin / kTile;
  const int tiles = static_cast<int>(CeilDiv(split.end - split.begin, kTile));
  const int each = block.each(), feature0 = Block::Feature0(warp), c0 = warp / 2 * kColumns;
  float sum[kColumns / 8][4] = {};

#pragma unroll 1
  for (int step = 0; step < tiles * each; ++step) {
    const int head = step % each;
    const int64_t number = first_tile + step / each;
    const WorkTile work = GetWorkTile(p.work, number);
    if (tid == 0)  // nobody reads pointers any more; the stream begins with a barrier
      *const_cast<CausalDkvPointers<T>*>(block.pointers()) =
          MakeCausalDkvPointers<T, W>(p, work, number, blockIdx.y);
    typename L::Stream stream(p.keys, p.map, work, blockIdx.y, shared + L::kStream, tid);
    IssueKeys(block, stream, tid);
    block.IssueQueries(head, stream.pointers->rows, tid);
    CpAsyncWait<0>();
    stream.ComputeBias(0, block.tile(L::kKey), tid);
    block.FinishKeys(tid);
    block.FinishGradOut(tid);
    if constexpr (!L::kConvertsKeys)
      MakeRanged<T, W, kTile, L::kThreads>(block.ranged(L::kRangedKey), block.tile(L::kKey), tid);
    __syncthreads();  // keys, values and queries are complete
    block.StorePairGradients(row0, lane);
    const bool advances = block.advances(), with_rest = head == 0;
    if (L::kSharesGradOut || advances) __syncthreads();  // nobody reads grad_out any more
    block.IssueFeatures(first, 0, tid);
    typename Block::After after;
    if (with_rest && !advances) block.LoadAfter(after, first, tid);
    if constexpr (L::kAdvances)
      if (advances) block.IssueNext(head, tid);
    CpAsyncWait<0>();
    if constexpr (L::kAdvances)
      if (advances) block.FinishNext(warp, tid);
    __syncthreads();  // the features are complete
    const int any = __any_sync(kAllLanes, block.StoreQueryFeatures(first, 0, head, warp, lane));
    if (lane == 0) any_steep[warp] = any;
    if (with_rest && !advances) block.AddAfter(after, 0, tid);
    if constexpr (L::kAdvances)
      if (advances) {
        __syncthreads();  // f of the next tile is visible
        block.Advance(first, with_rest, 0, warp, lane);
      }
    __syncthreads();  // f, R and r are visible
    const bool steep = __any_sync(kAllLanes, any_steep[lane % L::kWarps]) != 0;
    typename Block::Features db;
    {
      typename Block::KeyOperand kb;
      block.WeightGradients(db, with_rest || advances, !steep, 0, row0, Opaque(lane));
      block.TakeKeyWeights(db, kb, stream.bias, 0, row0, Opaque(lane));
    }
    if (steep) {
      block.StoreQueryLogWeights(first, head, warp, Opaque(lane));
      __syncthreads();  // log-weights are visible
      typename Block::Pairs unused = {};
      block.TakePairs(db, unused, stream.bias, 0, row0, Opaque(lane));
    }
    if (!p.map.linear()) block.TakeSlopes(db, 0, row0, Opaque(lane));
    if constexpr (L::kConvertsKeys) {
      __syncthreads();  // nobody reads keys in half any more
      MakeRanged<T, W, kTile, L::kThreads>(block.ranged(L::kKey), block.tile(L::kKey), tid);
    }
#pragma unroll
    for (int n = 0; n < Block::kFeatureTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        key_features[At<R, kTile>(n * 8 + 2 * (lane % 4) + (i & 1), row0 + lane / 4 + i / 2 * 8)] =
            FromFloat<R>(db[n][i]);
    __syncthreads();  // db slope is visible
#pragma unroll
    for (int s = 0; s < kTile / 16; ++s) {
      uint32_t a[kFragment<R>];
      LoadA<R, kTile>(a, key_features, feature0, s * 16, lane);
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t b[kFragment<R>];
        LoadBTrans<R, W>(b, block.ranged(L::kRangedKey), s * 16, c0 + n * 16, lane);
        Mma<R>(sum[2 * n], sum[2 * n + 1], a, b);
      }
    }
  }

  const int width = p.keys.key.width;
  float* const to = p.part_projection + (split_number * p.groups + blockIdx.y) * p.features * width;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int feature = first + feature0 + lane / 4 + 8 * e;
    if (feature >= p.features) continue;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = c0 + n * 8 + 2 * (lane % 4) + c;
        if (column < width)
          to[static_cast<int64_t>(feature) * width + column] = sum[n][2 * e + c] * p.map.root;
      }
  }
}

}  // namespace cuda
}  // namespace performer
