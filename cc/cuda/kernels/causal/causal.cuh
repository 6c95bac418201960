// Causal attention, in chunks with a running state:
//
//   out[i] = sum_{j <= i} A[i, j] v[j] / sum_{j <= i} A[i, j]
//
// Grid: (splits of all sequences, query heads, feature blocks). A block walks the chunks of its
// split from the state before it, which it keeps in registers. A warp owns 16 kFeatureTiles
// features of the state and, together with a peer, 16 query rows of the chunk. For each chunk:
//
//   keys      b = w k^T
//             anchor, kb = exp(b - anchor)       to shared memory
//             state += kb v
//   queries   f = exp(w q + anchor - row_max)    each peer over half of the features
//             local = f kb, num = f state_before
//   output    the peers add their sums through shared memory
//             out = (num + tril(local) v) / den
//
// The state is (anchor, mass, sum): log_mass = anchor + log(mass), mean = sum / mass. The anchor is
// the running reference maximum of a feature.
//
// Nothing of a later row may change a bit of an earlier one, whatever it holds:
// - A chunk is processed in sub-chunks, nearly always one. A feature's anchor for a sub-chunk is
//   the largest of its log_mass before and b of the sub-chunk's first key, if that is not masked. A
//   feature with neither has no anchor, and its weight is 0 in this sub-chunk.
// - A sub-chunk ends before a key that exceeds an anchor by more than kMaxGrowth, or that gives
//   something to a feature without anchor. Rows before the cut do the same arithmetic either way.
// - A product sums over rows of v, and 0 * inf is NaN. So a value that is not finite is replaced by
//   0 in the tile and remembered as poison[e], the first row from which column e is NaN. (A cut
//   before it would not help: later rows stay in the tile.)
// - Features need no such care: no product sums over keys before the causal mask, which selects and
//   does not multiply.
#pragma once
#include "cuda/kernels/causal/rows.cuh"

namespace performer {
namespace cuda {

template <class T, int W, int kFeatureTiles, bool kSmall>
__global__ void __launch_bounds__(CausalLayout<T, W, kFeatureTiles, kSmall>::kThreads, 1)
    CausalKernel(CausalParams<T> p) {
  using Block = CausalBlock<T, W, kFeatureTiles, kSmall>;
  using L = CausalLayout<T, W, kFeatureTiles, kSmall>;
  constexpr int C = L::kChunk;
  PERFORMER_SHARED_MEMORY(shared);
  const int tid = threadIdx.x;
  const WorkTile work = GetWorkTile(p.work, blockIdx.x);
  const int64_t head = blockIdx.y, group = p.group_of(head);
  const int first_feature = blockIdx.z * L::kFeatures;
  const Block block = {{p, shared}};
  if (tid == 0) {
    const int64_t row = work.first_row + work.begin;
    *block.pointers() = {
        p.query.Row(row, head), p.out.Row(row, head),
        p.feature_bias +
            QueryHeadIndex(p.feature_bias_heads, head, p.query.heads, group) * p.features,
        p.key_operands + (p.key_head_step * group + first_feature) * p.operand_row, row};
  }
  KeyStream<T, W, L::kThreads, C> stream(p.keys, p.map, work, group, shared + L::kStream, tid);
  const int chunks = (stream.pointers->rows + C - 1) / C;
  const auto issue = [&](int chunk, int buffer) {
    const int rows = stream.pointers->rows - chunk * C;
    CopyRows<T, W, C, L::kThreads>(block.tile(L::kQuery + buffer * L::kTileBytes),
                                   block.pointers()->query, chunk * C, p.query, tid,
                                   [&](int r) { return r < rows; });
    stream.Issue(chunk, buffer, block.tile(L::kKey + buffer * L::kTileBytes),
                 block.tile(L::kValue + buffer * L::kTileBytes), tid);
  };
  const T* w = p.projection.At(QueryHeadIndex(p.projection.heads, head, p.query.heads, group),
                               p.features_pad, W) +
               static_cast<int64_t>(first_feature) * W;
  CopyOperand<T, W, L::kFeatures, L::kThreads>(
      block.tile(L::kProjection), w, static_cast<int>(p.features_pad) - first_feature, tid);
  for (int column = tid; column < W; column += L::kThreads)
    reinterpret_cast<int*>(shared + L::kPoison)[column] = INT32_MAX;
  typename Block::State state;
  block.Start(state,
              p.before_each ? blockIdx.x * p.groups + group
                            : (p.before_count == 1 ? 0 : work.sequence) * p.groups + group,
              tid / 32, tid % 32);
  stream.LoadKeyBias(0, tid);
  if constexpr (L::kStages == 2) {
    stream.StoreKeyBias(0, tid);
    __syncthreads();
    issue(0, 0);
    stream.LoadKeyBias(1, tid);
  }

#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int buffer = L::kStages == 2 ? chunk & 1 : 0;
    const int row = chunk * C, rows = min(C, stream.pointers->rows - row);
    const T* queries = block.tile(L::kQuery + buffer * L::kTileBytes);
    const T* keys = block.tile(L::kKey + buffer * L::kTileBytes);
    T* values = block.tile(L::kValue + buffer * L::kTileBytes);
    const float* bias = stream.bias + buffer * C;
    if constexpr (L::kStages == 1) {
      stream.StoreKeyBias(0, tid);
      __syncthreads();  // [0] nobody reads the last chunk any more
      issue(chunk, 0);
      stream.LoadKeyBias(chunk + 1, tid);
    }
    CpAsyncWait<0>();
    stream.ComputeBias(buffer, keys, tid);
    if constexpr (L::kStages == 2) stream.StoreKeyBias(buffer ^ 1, tid);
    __syncthreads();  // [1] the chunk is complete; the other buffers are free
    if constexpr (L::kStages == 2)
      if (chunk + 1 < chunks) {
        issue(chunk + 1, buffer ^ 1);
        stream.LoadKeyBias(chunk + 2, tid);
      }
    block.ZeroNonFinite(values, row, tid);  // nobody reads v before [2], or poison before [5]

    int end;
#pragma unroll 1
    for (int begin = 0; begin < rows; begin = end) {  // the sub-chunks
      const int id = Opaque(tid), warp = id / 32, lane = id % 32;
      // Peers are warps i and kWarps - 1 - i, so that the two warps of a scheduler share out the
      // triangle: row tiles i and kRowTiles - 1 - i.
      const int part = warp / L::kRowTiles;
      const int row0 = (part ? L::kWarps - 1 - warp : warp) * 16;
      {
        typename Block::KeyLogits x;
        float keep[kFeatureTiles][2];
        bool none[kFeatureTiles][2];
        block.Keys(x, keys, bias, begin, warp, lane);
        const int cut = block.Anchor(x, bias, begin, state, keep, none, lane);
        int* cuts = reinterpret_cast<int*>(shared + L::kCuts);
        if (lane == 0) cuts[warp] = cut;
        __syncthreads();  // [2] cuts are known; what the last sub-chunk shared is done with
        end = C;
#pragma unroll
        for (int i = 0; i < L::kWarps; ++i) end = min(end, cuts[i]);
        if (end < C) Block::HideKeys(x, [&](int j) { return j >= end; }, lane);
        block.Update(x, values, keep, none, state, warp, lane);
      }
      __syncthreads();  // [3] kb, the old state and its anchors are visible
      typename Block::Sums sums;
#pragma unroll
      for (int n = 0; n < Block::kColumns; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.num[n][i] = 0.f;
#pragma unroll
      for (int n = 0; n < Block::kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.local[n][i] = 0.f;
#pragma unroll
      for (int e = 0; e < 2; ++e) sums.row_max[e] = -kInfinity, sums.den[e] = 0.f;
#pragma unroll 1
      for (int first = 0; first < L::kFeatures / 2; first += L::kQueryTile)
        block.Queries(sums, queries, row0, part * (L::kFeatures / 2) + first, lane);
      float own_num[Block::kOwnColumns][4];
      block.Exchange(sums, own_num, warp, part, lane);
      block.Write(sums, own_num, values, row0, part, begin, min(end, rows), row, lane);
    }
  }
  const WorkTile same = GetWorkTile(p.work, blockIdx.x);  // not kept: registers are short
  const int id = Opaque(tid);
  if (same.last() && head % (p.query.heads / p.groups) == 0)
    block.Finish(state, same.sequence * p.groups + group, stream.pointers->rows, id / 32, id % 32);
}

}  // namespace cuda
}  // namespace performer
