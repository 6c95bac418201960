// Gradient of causal attention with respect to keys and values: the reverse scan. The reverse state
// (R, r) of causal_backward/reverse_state.cuh is kept relative to the anchors, which never fall
// along the sequence, so that every factor on the way back is <= 1:
//
//   db = kb (R . v - r + f tril(dA))
//   over tokens     dw = root (db slope) k         R += f grad_out      r += f delta
//   over features   dv = kb^T R + tril(f kb)^T grad_out                 dbias_j = sum_m db
//                   dk = root (db slope)^T w - scale k sum_m db
//
// f, dA and what is made of them are computed for each query head of the key/value head in turn.
//
// Grid: (splits of all sequences, key/value heads). Masked keys get exactly 0. The block of a
// sequence's first split ends with the gradient of its initial state.
#pragma once
#include "cuda/kernels/causal_backward/dkv_layout.cuh"

namespace performer {
namespace cuda {

// What one block does, in phases.
template <class T, int W, int kWarps>
struct CausalDkvBlock : CausalBackwardBlock<T, W, CausalDkvParams<T>, CausalDkvLayout<T, W, kWarps>,
                                            CausalDkvPointers<T>> {
  using Base = CausalBackwardBlock<T, W, CausalDkvParams<T>, CausalDkvLayout<T, W, kWarps>,
                                   CausalDkvPointers<T>>;
  using Base::C, Base::kThreads, Base::kQueries;
  using Base::p, Base::shared, Base::warp, Base::tile, Base::ranged, Base::floats;
  using Base::pointers, Base::heads, Base::features;
  using typename Base::L, typename Base::R, typename Base::Warp, typename Base::Position;
  using KeyTile = typename Warp::Keys;  // 16 features x all keys of a chunk

  // The reverse state of a thread's features (rows g and g + 8), relative to exp(anchor).
  struct State {
    float sum[1][W / 8][4], mass[2], anchor[2];
  };
  int each;  // query heads of a key/value head

  PERFORMER_DEVICE int groups() const { return static_cast<int>(p.groups); }

  // The reverse state after the split's last row.
  PERFORMER_DEVICE void LoadState(State& state, int first_feature, int tid) const {
    const int lane = tid % 32, g = lane / 4, t = lane % 4, width = p.keys.value.width;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int feature = first_feature + tid / 32 * 16 + g + 8 * e;
      const bool given = feature < features();
      state.anchor[e] = given ? pointers()->after[feature] * p.map.inverse_root : -kInfinity;
      state.mass[e] = given ? pointers()->after_mass[feature] : 0.f;
#pragma unroll
      for (int n = 0; n < W / 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = n * 8 + 2 * t + c;
          state.sum[0][n][2 * e + c] =
              given && column < width
                  ? pointers()->after_mean[static_cast<int64_t>(feature) * width + column]
                  : 0.f;
        }
    }
  }

  // Before the first chunk: r becomes that of values that are less the first origin.
  PERFORMER_DEVICE void MoveOrigin(State& state, int tid) const {
    const int t = Opaque(tid) % 4;
    float more[2] = {};
#pragma unroll
    for (int n = 0; n < W / 8; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = n * 8 + 2 * t + c;
        const float moved = pointers()->origin[column] - pointers()->first_origin[column];
        more[0] += state.sum[0][n][c] * moved;
        more[1] += state.sum[0][n][2 + c] * moved;
      }
#pragma unroll
    for (int e = 0; e < 2; ++e) state.mass[e] += QuadSum(more[e]);
  }

  // Starts copying the queries of a chunk, and grad_out, of query head `head` of the group.
  PERFORMER_DEVICE void IssueQueries(int chunk, int head, int rows, int tid) const {
    const int first = chunk * C;
    const auto valid = [&](int r) { return first + r < rows; };
    CopyRows<T, W, C, kThreads>(tile(L::kQuery), pointers()->query + head * p.query.width, first,
                                p.query, tid, valid);
    CopyRows<T, W, C, kThreads>(tile(L::kGradOut), pointers()->grad_out + head * p.grad_out.width,
                                first, p.grad_out, tid, valid);
    CpAsyncCommit();
    if (tid < C)
      LoadStatistics<T>(floats(L::kRowMax), floats(L::kLogSum), floats(L::kDelta), tid,
                        pointers()->statistics, static_cast<int64_t>(first + tid) * heads() + head,
                        valid(tid));
  }

  // x = b, sub_chunk and anchor: of this warp's sub-chunk number `wanted`, or of the last one if
  // there are not so many. Returns the number.
  PERFORMER_DEVICE int FindSubChunk(KeyTile& x, SubChunk& sub_chunk, float (&anchor)[2], int wanted,
                                    int chunk, int first_feature, const float* bias,
                                    const Position& at) const {
    const int given = features() - first_feature - at.feature0;
    float log_mass[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int feature = at.lane / 4 + 8 * e;
      log_mass[e] =
          feature < given
              ? pointers()->chunk_log_mass[static_cast<int64_t>(chunk) * groups() * features() +
                                           first_feature + at.feature0 + feature] *
                    p.map.inverse_root
              : -kInfinity;
    }
    sub_chunk = {0, 0};
#pragma unroll 1
    for (int number = 0;; ++number) {
      warp.KeyLogits(
          x,
          [&](uint32_t (&a)[kFragment<T>], int s, int lane) {
            LoadA<T, W>(a, tile(L::kProjection), at.feature0, s * 16, lane);
          },
          tile(L::kKey), bias, given, at.lane);
      sub_chunk = warp.FindSubChunk(x, bias, sub_chunk.end, log_mass, anchor, at.lane);
      if (number == wanted || sub_chunk.end == C) return number;
      float added[2];
      warp.KeyWeights(x, sub_chunk, anchor, added, at.lane);
      warp.AddKeys(log_mass, anchor, added);
    }
  }

  // The reverse state becomes relative to `anchor`; its R goes to shared memory.
  PERFORMER_DEVICE void RescaleState(State& state, const float (&anchor)[2],
                                     const Position& at) const {
    const int lane = Opaque(at.lane);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float keep = warp.Factor(anchor[e], state.anchor[e]);
      state.anchor[e] = anchor[e];
      state.mass[e] *= keep;
#pragma unroll
      for (int n = 0; n < W / 8; ++n) {
        float &y0 = state.sum[0][n][2 * e], &y1 = state.sum[0][n][2 * e + 1];
        y0 *= keep;
        y1 *= keep;
        StorePair(ranged(L::kReverseState) +
                      At<R, W>(at.feature0 + lane / 4 + 8 * e, n * 8 + 2 * (lane % 4)),
                  y0, y1);
      }
    }
  }

  // The queries of one head, kQueries at a time: f to shared memory, db += f tril(dA), and the
  // reverse state takes them.
  PERFORMER_DEVICE void TakeQueries(KeyTile& db, State& state, const SubChunk& sub_chunk,
                                    const float (&anchor)[2], int64_t query_head, int first_feature,
                                    const Position& at) const {
    const int given = features() - first_feature - at.feature0, lane = at.lane;
    const float* const delta = floats(L::kDelta);
    const R* const grad_out = ranged(L::kGradOut);
    float anchor_and_bias[2];
    const float* feature_bias =
        p.feature_bias +
        QueryHeadIndex(p.feature_bias_heads, query_head, heads(), blockIdx.y) * features();
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int feature = lane / 4 + 8 * e;
      anchor_and_bias[e] = anchor[e];
      if (feature < given)
        anchor_and_bias[e] +=
            feature_bias[first_feature + at.feature0 + feature] * p.map.inverse_root;
    }
    // Past the last features the first ones are read, which weigh nothing.
    const int64_t first =
        first_feature + at.feature0 < p.features_pad ? first_feature + at.feature0 : 0;
    const uint32_t* operands =
        p.query_operands +
        (QueryHeadIndex(p.query_projections, query_head, heads(), blockIdx.y) * p.features_pad +
         first) *
            (W * L::kSize / 4);
#pragma unroll 1
    for (int i0 = 0; i0 < C; i0 += kQueries) {
      BackwardTile<1, kQueries> f;
      warp.template QueryFeatures<kQueries>(
          f,
          [&](uint32_t (&a)[kFragment<T>], int s, int lane) {
            LoadOperand<T>(a, operands + s * 32 * kFragment<T>, lane);
          },
          tile(L::kQuery), floats(L::kRowMax), floats(L::kLogSum), i0, sub_chunk, anchor_and_bias,
          lane);
      StoreSummed<R, 1, kQueries, C>(ranged(L::kQueryFeatures), f, at.feature0, i0, lane);
#pragma unroll
      for (int s = 0; s < kQueries / 16; ++s) {
        uint32_t a[kFragment<R>];
        PackA<R>(a, f[0][2 * s], f[0][2 * s + 1]);
#pragma unroll
        for (int n = 0; n < C / 16; ++n) {
          if (n * 16 > i0 + s * 16) continue;  // above the triangle
          uint32_t b[kFragment<R>];
          LoadBTrans<R, C>(b, ranged(L::kPairGradients), i0 + s * 16, n * 16, lane);
          Mma<R>(db[0][2 * n], db[0][2 * n + 1], a, b);
        }
      }
      SumTokens<R, W, 1, kQueries>(state.sum, f, grad_out, i0, Opaque(lane));
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float more = 0;
#pragma unroll
        for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c)
            more += f[0][n][2 * e + c] * delta[i0 + n * 8 + 2 * (lane % 4) + c];
        state.mass[e] += QuadSum(more);
      }
    }
  }

  // tril(f kb)^T, the attention weights of the chunk's own pairs [key][query], to shared memory.
  PERFORMER_DEVICE void StorePairWeights(const Position& at) const {
    constexpr int kPair = L::kPairColumns;
    if (at.part * kPair >= C) return;
    float y[kPair / 8][4] = {}, unused[2];
    const int c0 = at.part * kPair, lane = Opaque(at.lane);
    SumFeatures<R, C, L::kFeatures, kPair, false, C>(
        y, unused, ranged(L::kKeyWeights), ranged(L::kQueryFeatures), at.row0, c0, at.lane);
#pragma unroll
    for (int n = 0; n < kPair / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = at.row0 + lane / 4 + 8 * e, i = c0 + n * 8 + 2 * (lane % 4);
        StorePair(ranged(L::kPairWeights) + At<R, C>(j, i), j <= i ? y[n][2 * e] : 0.f,
                  j <= i + 1 ? y[n][2 * e + 1] : 0.f);
      }
  }

  // dv += tril(f kb)^T grad_out, and kb^T R once, with_state.
  PERFORMER_DEVICE void StoreGradValue(bool with_state, bool first_part, bool last_part, int chunk,
                                       int rows, const float* key_bias, const Position& at) const {
#pragma unroll 1
    for (int i = 0; i < L::kWarpColumns; i += L::kColumns) {
      const int c0 = at.part * L::kWarpColumns + i, lane = Opaque(at.lane);
      float dv[L::kColumns / 8][4] = {}, unused[2];
      if (with_state)
        SumFeatures<R, W, L::kFeatures, L::kColumns, false, C>(
            dv, unused, ranged(L::kKeyWeights), ranged(L::kReverseState), at.row0, c0, at.lane);
#pragma unroll(kUnroll<R>)
      for (int s = 0; s < C / 16; ++s) {
        uint32_t a[kFragment<R>];
        LoadA<R, C>(a, ranged(L::kPairWeights), at.row0, s * 16, lane);
#pragma unroll
        for (int n = 0; n < L::kColumns / 16; ++n) {
          uint32_t b[kFragment<R>];
          LoadBTrans<R, W>(b, ranged(L::kGradOut), s * 16, c0 + n * 16, lane);
          Mma<R>(dv[2 * n], dv[2 * n + 1], a, b);
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = at.row0 + lane / 4 + 8 * e, row = chunk * C + r;
        if (row >= rows) continue;
#pragma unroll
        for (int n = 0; n < L::kColumns / 8; ++n) {
          const int column = c0 + n * 8 + 2 * (lane % 4);
          float2 y = {dv[n][2 * e], dv[n][2 * e + 1]};
          if (!AddPart(y, pointers()->sum_value, static_cast<int64_t>(row) * groups() * W + column,
                       first_part, last_part))
            continue;
          if (key_bias[r] == -kInfinity) y = float2{0.f, 0.f};
          StoreColumns(pointers()->grad_value + static_cast<int64_t>(row) * p.grad_value.stride,
                       column, p.grad_value.width, p.grad_value.aligned, y.x, y.y);
        }
      }
    }
  }

  // db *= kb; then to shared memory db slope, and dw takes it. total: this thread's share of the
  // sum of db over features, of the operand as it is rounded (the errors cancel in dk), if the map
  // is not linear.
  PERFORMER_DEVICE void FinishKeyGradients(KeyTile& db, float (&total)[2],
                                           typename L::Kept& sum_projection,
                                           const Position& at) const {
    {  // kb from its tile: registers are short
      KeyTile kb;
      LoadSummed<R, 1, C, C>(kb, ranged(L::kKeyWeights), at.feature0, 0, at.lane);
#pragma unroll
      for (int n = 0; n < C / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          db[0][n][i] = kb[0][n][i] == 0.f ? 0.f : kb[0][n][i] * db[0][n][i];
    }
    R* const key_gradients = ranged(L::kKeyGradients);
    StoreSummed<R, 1, C, C>(key_gradients, db, at.feature0, 0, at.lane);
    if (!p.map.linear()) {
      __syncthreads();  // [7] db is visible
      TotalOfFeatures<R, L::kFeatures, C>(total, key_gradients, at.row0, at.lane);
      ChainSlope<T, W, 1, C>(db, p.map, tile(L::kProjection), at.feature0, tile(L::kKey), 0,
                             at.lane);
      __syncthreads();  // [8] db may be overwritten
      StoreSummed<R, 1, C, C>(key_gradients, db, at.feature0, 0, at.lane);
    }
    sum_projection.template Add<R, C>(db, ranged(L::kRangedKey), at.lane);
  }

  // dk and the gradient of key_bias. total: as FinishKeyGradients leaves it.
  PERFORMER_DEVICE void StoreGradKey(float (&total)[2], bool first_part, bool last_part, int chunk,
                                     int rows, const float* key_bias, const Position& at) const {
    const bool linear = p.map.linear();
    const R* const key_gradients = ranged(L::kKeyGradients);
    const R* const projection = ranged(L::kRangedProjection);
#pragma unroll 1
    for (int i = 0; i < L::kWarpColumns; i += L::kColumns) {
      const int c0 = at.part * L::kWarpColumns + i, lane = Opaque(at.lane);
      float dk[L::kColumns / 8][4] = {}, unused[2];
      if (linear && i == 0)
        SumFeatures<R, W, L::kFeatures, L::kColumns, true, C>(dk, total, key_gradients, projection,
                                                              at.row0, c0, at.lane);
      else
        SumFeatures<R, W, L::kFeatures, L::kColumns, false, C>(dk, unused, key_gradients,
                                                               projection, at.row0, c0, at.lane);
      if (i == 0) total[0] = QuadSum(total[0]), total[1] = QuadSum(total[1]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = at.row0 + lane / 4 + 8 * e, row = chunk * C + r;
        if (row >= rows) continue;
        const bool masked = key_bias[r] == -kInfinity;
        const float norm = p.map.root * p.map.root * total[e];
#pragma unroll
        for (int n = 0; n < L::kColumns / 8; ++n) {
          const int column = c0 + n * 8 + 2 * (lane % 4);
          float2 y = {dk[n][2 * e] * p.map.root, dk[n][2 * e + 1] * p.map.root};
          if (p.map.key_norm) {
            const float2 k = LoadPair(tile(L::kKey) + At<T, W>(r, column));
            y.x -= norm * k.x, y.y -= norm * k.y;
          }
          if (!AddPart(y, pointers()->sum_key, static_cast<int64_t>(row) * groups() * W + column,
                       first_part, last_part))
            continue;
          if (masked) y = float2{0.f, 0.f};
          StoreColumns(pointers()->grad_key + static_cast<int64_t>(row) * p.grad_key.stride, column,
                       p.grad_key.width, p.grad_key.aligned, y.x, y.y);
        }
        if (c0 != 0 || lane % 4 != 0 || pointers()->grad_bias == nullptr) continue;
        float y = total[e];
        if (!first_part) y += pointers()->grad_bias[row];
        pointers()->grad_bias[row] = last_part && masked ? 0.f : y;
      }
    }
  }

  // The chunk's sub-chunks of every warp, the last one first; keys and values are in shared memory,
  // and so are the queries if the group has one head. key_bias: of the chunk, as given.
  PERFORMER_DEVICE void TakeChunk(State& state, typename L::Kept& sum_projection, int chunk,
                                  int rows, int first_feature, const float* bias,
                                  const float* key_bias, int tid) const {
    // Phases that are short of registers compute their position again.
    const Position at(tid);
    const bool first_block = first_feature == 0;
    const bool last_block = first_feature + L::kFeatures >= features();
    int* const counts = reinterpret_cast<int*>(shared + L::kCounts);
    KeyTile x;
    SubChunk sub_chunk;
    float anchor[2];
    // There are as many passes as the warp with most sub-chunks needs.
    int last_sub_chunk = 0, passes = 1;
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {
      if (pass <= last_sub_chunk) {
        const int number = FindSubChunk(x, sub_chunk, anchor, pass == 0 ? C : last_sub_chunk - pass,
                                        chunk, first_feature, bias, at);
        if (pass == 0) {
          last_sub_chunk = number;
          if (at.lane == 0) counts[at.warp] = number + 1;
        }
      } else {  // there is none left
        sub_chunk = {0, 0};
        anchor[0] = state.anchor[0], anchor[1] = state.anchor[1];
      }
      KeyTile db;
      float key_sum[2];
      RescaleState(state, anchor, at);
      warp.KeyWeights(x, sub_chunk, anchor, key_sum, at.lane);
      StoreSummed<R, 1, C, C>(ranged(L::kKeyWeights), x, at.feature0, 0, at.lane);
#pragma unroll
      for (int n = 0; n < C / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) db[0][n][i] = -state.mass[i / 2];
      StateProduct<R, W, C>(db, state.sum[0], ranged(L::kValue), 0, at.lane);

#pragma unroll 1
      for (int head = 0; head < each; ++head) {
        if (each > 1) {
          __syncthreads();  // [2] everybody is done with the last queries
          IssueQueries(chunk, head, rows, tid);
          CpAsyncWait<0>();
          MakeRanged<T, W, C, kThreads>(ranged(L::kGradOut), tile(L::kGradOut), tid);
          __syncthreads();  // [3] the queries are complete
        }
        StorePairGradients<T, W, L::kPairColumns>(
            ranged(L::kPairGradients), static_cast<R*>(nullptr), ranged(L::kGradOut),
            ranged(L::kValue), floats(L::kDelta), at.row0, at.part * L::kPairColumns, at.lane);
        __syncthreads();  // [4] R, kb, dA and numbers of sub-chunks are visible
        if (pass == 0 && head == 0)
#pragma unroll
          for (int i = 0; i < L::kWarps; ++i) passes = max(passes, counts[i]);
        TakeQueries(db, state, sub_chunk, anchor, static_cast<int64_t>(blockIdx.y) * each + head,
                    first_feature, Position(tid));
        __syncthreads();  // [5] f is visible; dA may be overwritten
        StorePairWeights(at);
        __syncthreads();  // [6] pair weights are visible; f may be overwritten
        StoreGradValue(head == 0, first_block && pass == 0 && head == 0,
                       last_block && pass + 1 == passes && head + 1 == each, chunk, rows, key_bias,
                       at);
      }

      float total[2] = {};
      FinishKeyGradients(db, total, sum_projection, Position(tid));
      __syncthreads();  // [9] db slope is visible
      StoreGradKey(total, first_block && pass == 0, last_block && pass + 1 == passes, chunk, rows,
                   key_bias, Position(tid));
    }
  }
};

template <class T, int W, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 1) CausalDkvKernel(CausalDkvParams<T> p) {
  using Block = CausalDkvBlock<T, W, kWarps>;
  using L = typename Block::L;
  constexpr int C = L::kRows, kThreads = L::kThreads;
  PERFORMER_SHARED_MEMORY(shared);
  const Block block = {{p, shared, {p.map, p.map.unit()}},
                       static_cast<int>(p.query.heads) / static_cast<int>(p.groups)};
  const int tid = threadIdx.x, features = block.features();

  if (tid == 0)
    *const_cast<CausalDkvPointers<T>*>(block.pointers()) =
        MakeCausalDkvPointers<T, W>(p, blockIdx.x, blockIdx.y);
  KeyStream<T, W, kThreads, C> stream(p.keys, p.map, GetWorkTile(p.work, blockIdx.x), blockIdx.y,
                                      shared + L::kStream, tid);
  const int rows = stream.pointers->rows, chunks = static_cast<int>(CeilDiv(rows, C));

#pragma unroll 1
  for (int first_feature = 0; first_feature < features; first_feature += L::kFeatures) {
    __syncthreads();  // nobody reads the last features and keys any more
    block.LoadProjection(first_feature, tid);
    stream.LoadKeyBias(chunks - 1, tid);
    typename Block::State state;
    typename L::Kept sum_projection(shared + L::kKept, tid);
    block.LoadState(state, first_feature, tid);

#pragma unroll 1
    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
      float* const key_bias = block.floats(L::kKeyBias) + (chunk & 1) * C;
      stream.StoreKeyBias(0, tid);
      __syncthreads();  // [0] nobody reads the last chunk any more
      stream.Issue(chunk, 0, block.tile(L::kKey), block.tile(L::kValue), tid);
      if (chunk > 0) stream.LoadKeyBias(chunk - 1, tid);
      if (block.each == 1) block.IssueQueries(chunk, 0, rows, tid);
      CpAsyncWait<0>();
      stream.ComputeBias(0, block.tile(L::kKey), tid);
      if constexpr (!kIs16Bit<T>)
        SubtractOrigin<T, W, C, kThreads>(
            block.tile(L::kValue),
            chunk == 0 ? block.pointers()->first_origin : block.pointers()->origin, tid);
      if (tid < C) key_bias[tid] = stream.key_bias[tid];
      MakeRanged<T, W, C, kThreads>(block.ranged(L::kValue), block.tile(L::kValue), tid);
      MakeRanged<T, W, C, kThreads>(block.ranged(L::kRangedKey), block.tile(L::kKey), tid);
      if (block.each == 1)
        MakeRanged<T, W, C, kThreads>(block.ranged(L::kGradOut), block.tile(L::kGradOut), tid);
      __syncthreads();  // [1] the chunk is complete
      if constexpr (!kIs16Bit<T>)
        if (chunk == 0) block.MoveOrigin(state, tid);
      block.TakeChunk(state, sum_projection, chunk, rows, first_feature, stream.bias, key_bias,
                      tid);
    }

    const int lane = tid % 32, feature0 = first_feature + tid / 32 * 16;
    float dw[1][W / 8][4];
    sum_projection.Read(dw);
    StoreSums<W, 1>(
        p.part_projection + (static_cast<int64_t>(blockIdx.x) * block.groups() + blockIdx.y) *
                                features * p.keys.key.width,
        p.keys.key.width, features, feature0, dw, p.map.root, lane);
    if (block.pointers()->grad_initial_log_mass != nullptr)
      StoreInitialGradient<T, W>(*block.pointers(), block.warp, feature0, features,
                                 p.keys.value.width, state.sum[0], state.mass, state.anchor, lane);
  }
}

}  // namespace cuda
}  // namespace performer
