// Causal attention, in tiles of kTile rows side by side:
//
//   out[i] = sum_{j <= i} A[i, j] v[j] / sum_{j <= i} A[i, j]
//
// The keys before a tile are a state, those of the tile are taken pair by pair. Grid: (tiles of all
// sequences, query heads). A block walks the features in blocks of 64, with online softmax as in
// flash attention (arXiv:2205.14135); a warp owns 16 features and 16 query rows:
//
//   keys      b = w k^T
//             anchor, kb = exp(b - anchor)                      to shared memory
//             state, mass = those before the tile, relative to exp(anchor)
//   queries   f = exp(w q + anchor - row_max)
//             num += f state, den += f mass, local += f kb
//
// and after the last feature block
//
//   out = (num + tril(local) v) / (den + tril(local) 1)
//
// The state before a tile comes in two parts: that before its split, and the checkpoint, which has
// the rows of the split (causal/split_states.cuh). The anchor is a reference for each feature.
//
// Nothing of a later row may change a bit of an earlier one, whatever it holds:
// - A feature block is processed in sub-chunks of rows, nearly always one. A feature's anchor for a
//   sub-chunk is the largest of its log_mass before the tile and b of the tile's keys up to the
//   first of the sub-chunk. A feature with none of these has no anchor, and its weight is 0.
// - A sub-chunk ends before a key that exceeds an anchor by more than kMaxGrowth, or that gives
//   something to a feature without anchor. Rows before the cut do the same arithmetic either way.
// - A product sums over rows of v, and 0 * inf is NaN. So a value that is not finite is replaced by
//   0 in the tile and remembered as poison[e], the first row from which column e is NaN.
// - Features need no such care: no product sums over keys before the causal mask, which selects and
//   does not multiply.
#pragma once
#include "cuda/kernels/causal/queries.cuh"

namespace performer {
namespace cuda {

template <class T, int W>
__global__ void __launch_bounds__(128, 2) CausalKernel(CausalParams<T> p) {
  using Block = CausalBlock<T, W>;
  using L = CausalLayout<T, W>;
  constexpr int kThreads = L::kThreads;
  PERFORMER_SHARED_MEMORY(shared);
  const int tid = threadIdx.x;
  // From a shuffle, so that branches on it are known to be the same for the whole warp.
  const int warp = __shfl_sync(kAllLanes, tid / 32, 0), lane = tid % 32, row0 = warp * 16;
  const Block block = {{p, shared}};
  int* const cuts = reinterpret_cast<int*>(shared + L::kCuts);
  const WorkTile work = GetWorkTile(p.work, blockIdx.x);
  if (tid == 0) *block.pointers() = MakeCausalPointers<T, W>(p, work, blockIdx.x, p.out);
  for (int column = tid; column < W; column += kThreads)
    reinterpret_cast<int*>(shared + L::kPoison)[column] = INT32_MAX;
  KeyStream<T, W, kThreads> stream(p.keys, p.map, work, blockIdx.y / (p.query.heads / p.groups),
                                   shared + L::kStream, tid);
  stream.LoadKeyBias(0, tid);
  stream.StoreKeyBias(0, tid);
  __syncthreads();  // the mask of the keys is visible
  const int rows = stream.pointers->rows, features = static_cast<int>(p.features_pad);
  CopyRows<T, W, kTile, kThreads>(block.tile(L::kQuery), block.pointers()->query, 0, p.query, tid,
                                  [&](int r) { return r < rows; });
  stream.Copy(p.keys.key, stream.pointers->key, 0, 0, block.tile(L::kKey), tid);
  const auto issue = [&](int first, int buffer) {
    const CausalPointers<T>& from = *block.pointers();
    const int64_t at = static_cast<int64_t>(first) * W;
    CopyOperand<T, W, L::kFeatures, kThreads>(
        block.tile(L::kProjection + buffer * L::kFeatureBytes), from.projection + at, tid);
    T* const state = block.tile(L::kState + buffer * L::kFeatureBytes);
    if (from.mean != nullptr)
      CopyOperand<T, W, L::kFeatures, kThreads>(state, from.mean + at, tid);
    else
      for (int i = tid; i < L::kFeatureBytes / 16; i += kThreads)
        reinterpret_cast<uint4*>(state)[i] = uint4{0, 0, 0, 0};
    CpAsyncCommit();
  };
  if constexpr (L::kStages == 2) issue(0, 0);
  typename Block::Features own;
  block.Load(own, warp * 16, lane);
  typename Block::Sums sums;
  sums.Init();

#pragma unroll 1
  for (int first = 0; first < features; first += L::kFeatures) {
    const int buffer = L::kStages == 2 ? first / L::kFeatures & 1 : 0;
    const T* projection = block.tile(L::kProjection + buffer * L::kFeatureBytes);
    T* state = block.tile(L::kState + buffer * L::kFeatureBytes);
    if constexpr (L::kStages == 1) {
      __syncthreads();  // nobody reads the last feature block any more
      issue(first, 0);
    }
    CpAsyncWait<0>();
    if (first == 0) stream.ComputeBias(0, block.tile(L::kKey), tid);
    __syncthreads();  // the feature block is complete; the other buffer is free
    const bool last = first + L::kFeatures >= features;
    if (L::kStages == 2 && !last) issue(first + L::kFeatures, buffer ^ 1);

    typename Block::Anchors anchors;
    int end;
#pragma unroll 1
    for (int begin = 0; begin < rows; begin = end) {  // the sub-chunks
      {
        typename Block::KeyLogits x;
        float2 shares[2];
        block.Logits(x, own, stream.bias, block.tile(L::kKey), first + warp * 16, Opaque(lane));
        if (begin == 0)
          block.FirstAnchors(anchors, shares, own, x, lane);
        else
          block.NextAnchors(anchors, shares, x, begin, lane);
        const int cut = block.Cut(x, anchors, begin, lane);
        if (lane == 0) cuts[warp] = cut;
        block.StoreWeights(x, anchors, own, cut, warp, Opaque(lane));
        block.ScaleState(state, shares, begin == 0, first, warp, Opaque(lane));
      }
      __syncthreads();  // kb, the state, anchors and cuts are visible
      end = min(min(cuts[0], cuts[1]), min(cuts[2], cuts[3]));
      if (end >= rows) {  // keys are done with, unless there are more features
        if (!last)
          block.Load(own, first + L::kFeatures + warp * 16, lane);
        else
          stream.Copy(p.keys.value, stream.pointers->value, 0, 0, block.tile(L::kKey), tid);
      }
      block.Queries(sums, projection, state, row0, begin, end, lane);
      if (end < rows) __syncthreads();  // kb and the state may be overwritten
    }
  }
  CpAsyncCommit();
  CpAsyncWait<0>();
  T* const values = block.tile(L::kKey);
  ZeroNonFinite<T, W, kThreads>(values, reinterpret_cast<int*>(shared + L::kPoison), tid);
  __syncthreads();  // values and poison are visible
  block.Write(sums, values, p.out, row0, rows, lane);
}

}  // namespace cuda
}  // namespace performer
