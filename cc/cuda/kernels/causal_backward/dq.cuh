// Gradient of causal attention with respect to queries: the forward scan. (sum, mass) is the state
// before the sub-chunk.
//
//   da = f (sum . grad_out - delta mass + kb tril(dA)^T)
//   over tokens     dw = root (da slope) q      dfeature_bias = da 1      state += kb v
//   over features   dq = root (da slope)^T w
//
// Grid: (splits of all sequences, query heads). Sums over tokens are partial results of a split and
// head, for backward/sum_partials.cuh.
#pragma once
#include "cuda/kernels/causal_backward/common.cuh"

namespace performer {
namespace cuda {

template <class T>
struct CausalDqParams : CausalGradientParams<T> {
  Projection<T> projection;                // of queries
  const uint32_t* key_operands = nullptr;  // projections of keys, see PackOperandsKernel
  int64_t key_head_step = 0;               // rows between heads' operands: features_pad or 0
  float* corrected_delta = nullptr;        // [B L, H], of CausalDeltaKernel
  RowsOf<T> grad_query;                    // [B L, H, D]
  float* sum_query = nullptr;  // [B L, H, W], if a block cannot hold all features, else nullptr
  float* part_feature_bias = nullptr;  // [splits, H, M]
  float* part_projection = nullptr;    // [splits, H, M, D]
};

// The pointers of a block, in shared memory as KeyPointers. Rows start at the split's first row,
// and heads at the block's.
template <class T>
struct CausalDqPointers {
  const T *query, *grad_out;     // [rows, H, D or E]
  T* grad_query;                 // [rows, H, D]
  float* sum_query;              // [rows, H, W], or nullptr
  float* corrected_delta;        // [rows, H], nullptr except in CausalDeltaKernel
  const T* projection;           // [M_pad, W]
  const uint32_t* key_operands;  // [M_pad / 16, W / 16, 32, kFragment]
  const float* feature_bias;     // [M]
  const float *log_mass, *mean;  // [M], [M, E]: the state before the split
  RowStatistics statistics;      // [rows, H]
  // [W], or nullptr in 16 bits: of the values of the first tile, and of the others.
  const float *first_origin, *origin;
};

template <class T, int W, int kWarps>
struct CausalDqLayout : CausalBackwardLayout<T, W, kWarps> {
  using S = CausalBackwardLayout<T, W, kWarps>;
  static constexpr int kProjection = 0;
  static constexpr int kRangedProjection = kHasRanged<T> ? S::kFeatureBytes : 0;
  static constexpr int kQuery = kRangedProjection + S::kFeatureBytes;
  static constexpr int kRangedQuery = kQuery + (kHasRanged<T> ? S::kTileBytes : 0);
  static constexpr int kKey = kRangedQuery + S::kTileBytes;
  static constexpr int kValue = kKey + S::kTileBytes;
  static constexpr int kGradOut = kValue + S::kTileBytes;
  static constexpr int kSummed = kGradOut + S::kTileBytes;  // da [kFeatures][kRows]
  static constexpr int kPairs = kSummed + S::kSummedBytes;  // dA
  static constexpr int kPairRest = kPairs + S::kPairBytes;  // what rounding took from dA
  static constexpr int kRowMax = kPairRest + (kIs16Bit<T> ? S::kPairBytes : 0);  // float [kRows]
  static constexpr int kDelta = kRowMax + S::kRows * 4;                          // likewise
  static constexpr int kLogSum = kDelta + S::kRows * 4;                          // likewise
  static constexpr int kStream = kLogSum + (kKeepsLogSum<T> ? S::kRows * 4 : 0);
  static constexpr int kPointers = kStream + KeyStream<T, W, S::kThreads, S::kRows>::kSharedBytes;
  static constexpr int kBytes = kPointers + static_cast<int>(sizeof(CausalDqPointers<T>));
  static_assert(kStream % 8 == 0 && kPointers % 8 == 0 && kBytes <= S::kMaxBytes);
};

// What one block does, in phases. kDelta: CausalDeltaKernel.
template <class T, int W, int kWarps, bool kDelta>
struct CausalDqBlock : CausalBackwardBlock<T, W, CausalDqParams<T>, CausalDqLayout<T, W, kWarps>,
                                           CausalDqPointers<T>> {
  using Base = CausalBackwardBlock<T, W, CausalDqParams<T>, CausalDqLayout<T, W, kWarps>,
                                   CausalDqPointers<T>>;
  using Base::C, Base::kThreads, Base::kQueries;
  using Base::p, Base::shared, Base::warp, Base::tile, Base::ranged, Base::floats;
  using Base::pointers, Base::heads, Base::features;
  using typename Base::L, typename Base::R, typename Base::Warp, typename Base::Position;

  // The state of a thread's features (rows g and g + 8): log_mass = anchor + log(mass),
  // mean = sum / mass.
  struct State {
    float sum[W / 8][4], mass[2], anchor[2];
  };
  // Sums over tokens: dw and dfeature_bias.
  struct Gradients {
    float projection[1][W / 8][4] = {}, bias[2] = {};
  };
  using KeyOperand = uint32_t[C / 16][kFragment<R>];  // kb, as rounded

  // By one thread.
  PERFORMER_DEVICE void StorePointers() const {
    const WorkTile work = GetWorkTile(p.work, blockIdx.x);
    const int64_t head = blockIdx.y, each = heads() / p.groups, group = head / each;
    const int64_t row0 = work.first_row + work.begin, at = row0 * heads() + head;
    const int64_t state =
        (p.before_each ? blockIdx.x : (p.before_count == 1 ? 0 : work.sequence)) * p.groups + group;
    *const_cast<CausalDqPointers<T>*>(pointers()) = {
        p.query.Row(row0, head),
        p.grad_out.Row(row0, head),
        p.grad_query.Row(row0, head),
        p.sum_query == nullptr ? nullptr : p.sum_query + at * W,
        kDelta ? p.corrected_delta + at : nullptr,
        p.projection.At(QueryHeadIndex(p.projection.heads, head, heads(), group), p.features_pad,
                        W),
        p.key_operands + p.key_head_step * group * (W * L::kSize / 4),
        p.feature_bias + QueryHeadIndex(p.feature_bias_heads, head, heads(), group) * features(),
        p.before_log_mass + state * features(),
        p.before_mean + state * features() * p.keys.value.width,
        StatisticsFrom<T>(p.statistics, at),
        OriginOfTile<T, W>(p.origin, blockIdx.x, p.groups, group, false),
        OriginOfTile<T, W>(p.origin, blockIdx.x, p.groups, group, true)};
  }

  // The state before the split's first row; feature_bias in units of root.
  PERFORMER_DEVICE void LoadState(State& state, float (&feature_bias)[2], int first_feature,
                                  int tid) const {
    const int lane = tid % 32, g = lane / 4, t = lane % 4, width = p.keys.value.width;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int feature = first_feature + tid / 32 * 16 + g + 8 * e;
      const bool given = feature < features();
      const float log_mass = given ? pointers()->log_mass[feature] : -kInfinity;
      feature_bias[e] = given ? pointers()->feature_bias[feature] * p.map.inverse_root : 0.f;
      state.mass[e] = log_mass == -kInfinity ? 0.f : 1.f;
      state.anchor[e] = log_mass == -kInfinity ? 0.f : log_mass * p.map.inverse_root;
#pragma unroll
      for (int n = 0; n < W / 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = n * 8 + 2 * t + c;
          const bool seen = log_mass != -kInfinity && column < width;
          float& y = state.sum[n][2 * e + c];
          y = seen ? pointers()->mean[static_cast<int64_t>(feature) * width + column] : 0.f;
          if constexpr (!kIs16Bit<T>)
            if (seen) y -= pointers()->first_origin[column];
        }
    }
  }

  // After the first tile: sums become those of values that are less the other origin.
  PERFORMER_DEVICE void MoveOrigin(State& state, int tid) const {
    const int t = tid % 4;
#pragma unroll
    for (int n = 0; n < W / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = n * 8 + 2 * t + (i & 1);
        state.sum[n][i] -=
            state.mass[i / 2] * (pointers()->origin[column] - pointers()->first_origin[column]);
      }
  }

  // Copies a chunk of all inputs to shared memory, and waits for it.
  template <class Stream>
  PERFORMER_DEVICE void LoadChunk(Stream& stream, int chunk, int rows, int tid) const {
    const int first = chunk * C;
    const auto valid = [&](int r) { return first + r < rows; };
    CopyRows<T, W, C, kThreads>(tile(L::kQuery), pointers()->query, first, p.query, tid, valid);
    CopyRows<T, W, C, kThreads>(tile(L::kGradOut), pointers()->grad_out, first, p.grad_out, tid,
                                valid);
    stream.Issue(chunk, 0, tile(L::kKey), tile(L::kValue), tid);
    stream.LoadKeyBias(chunk + 1, tid);
    if (tid < C)
      LoadStatistics<T>(floats(L::kRowMax), floats(L::kLogSum), floats(L::kDelta), tid,
                        pointers()->statistics, static_cast<int64_t>(first + tid) * heads(),
                        valid(tid));
    CpAsyncWait<0>();
    stream.ComputeBias(0, tile(L::kKey), tid);
    if constexpr (!kIs16Bit<T>)
      SubtractOrigin<T, W, C, kThreads>(
          tile(L::kValue), chunk < kTile / C ? pointers()->first_origin : pointers()->origin, tid);
    MakeRanged<T, W, C, kThreads>(ranged(L::kValue), tile(L::kValue), tid);
    MakeRanged<T, W, C, kThreads>(ranged(L::kGradOut), tile(L::kGradOut), tid);
    MakeRanged<T, W, C, kThreads>(ranged(L::kRangedQuery), tile(L::kQuery), tid);
  }

  // The next sub-chunk: the state becomes relative to its anchors; kb, and key_sum, the sum of it.
  PERFORMER_DEVICE void TakeKeys(KeyOperand& kb, float (&key_sum)[2], State& state,
                                 SubChunk& sub_chunk, int first_feature, const float* bias,
                                 const Position& at) const {
    typename Warp::Keys x;
    const uint32_t* operands =
        pointers()->key_operands +
        static_cast<int64_t>(first_feature + at.feature0) * (W * L::kSize / 4);
    // Past the last features the first ones are read, and their logits are replaced.
    if (first_feature + at.feature0 >= p.features_pad) operands = pointers()->key_operands;
    warp.KeyLogits(
        x,
        [&](uint32_t (&a)[kFragment<T>], int s, int lane) {
          LoadOperand<T>(a, operands + s * 32 * kFragment<T>, lane);
        },
        tile(L::kKey), bias, features() - first_feature - at.feature0, at.lane);
    float log_mass[2], next[2];
#pragma unroll
    for (int e = 0; e < 2; ++e)
      log_mass[e] =
          state.mass[e] == 0.f ? -kInfinity : state.anchor[e] + Log2(state.mass[e]) / warp.unit;
    sub_chunk = warp.FindSubChunk(x, bias, sub_chunk.end, log_mass, next, at.lane);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float keep = state.mass[e] == 0.f ? 0.f : Exp2((state.anchor[e] - next[e]) * warp.unit);
      state.anchor[e] = next[e];
      state.mass[e] *= keep;
#pragma unroll
      for (int n = 0; n < W / 8; ++n) state.sum[n][2 * e] *= keep, state.sum[n][2 * e + 1] *= keep;
    }
    warp.KeyWeights(x, sub_chunk, state.anchor, key_sum, at.lane);
#pragma unroll
    for (int s = 0; s < C / 16; ++s) PackA<R>(kb[s], x[0][2 * s], x[0][2 * s + 1]);
    // The sum is that of the rounded weights, as in `sum`: their errors cancel in
    // sum . grad_out - delta mass.
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float all = 0;
#pragma unroll
      for (int s = 0; s < C / 16; ++s) all += OperandSum<R>(kb[s], e);
      key_sum[e] = QuadSum(all);
    }
  }

  // da of all queries, kQueries at a time: added to that of the sub-chunks before, in shared
  // memory, and to the sums over tokens.
  PERFORMER_DEVICE void TakeQueries(Gradients& gradients, const State& state, const KeyOperand& kb,
                                    const SubChunk& sub_chunk, const float (&feature_bias)[2],
                                    const Position& at) const {
    const float* const delta = floats(L::kDelta);
#pragma unroll 1
    for (int i0 = 0; i0 < C; i0 += kQueries) {
      const int lane = Opaque(at.lane), t = lane % 4;
      BackwardTile<1> f, da;
      {
        const float anchor_and_bias[2] = {state.anchor[0] + feature_bias[0],
                                          state.anchor[1] + feature_bias[1]};
        warp.template QueryFeatures<kQueries>(
            f,
            [&](uint32_t (&a)[kFragment<T>], int s, int lane) {
              LoadA<T, W>(a, tile(L::kProjection), at.feature0, s * 16, lane);
            },
            tile(L::kQuery), floats(L::kRowMax), floats(L::kLogSum), i0, sub_chunk, anchor_and_bias,
            at.lane);
      }
#pragma unroll
      for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          da[0][n][i] = -delta[i0 + n * 8 + 2 * t + (i & 1)] * state.mass[i / 2];
      StateProduct<R, W, kQueries>(da, state.sum, ranged(L::kGradOut), i0, lane);
#pragma unroll
      for (int s = 0; s < C / 16; ++s)
#pragma unroll
        for (int n = 0; n < kQueries / 16; ++n) {
          if (s * 16 > i0 + n * 16) continue;  // above the triangle
          uint32_t b[kFragment<R>];
          if constexpr (kIs16Bit<R>) {
            LoadB<R, C>(b, ranged(L::kPairRest), i0 + n * 16, s * 16, lane);
            Mma<R>(da[0][2 * n], da[0][2 * n + 1], kb[s], b);
          }
          LoadB<R, C>(b, ranged(L::kPairs), i0 + n * 16, s * 16, lane);
          Mma<R>(da[0][2 * n], da[0][2 * n + 1], kb[s], b);
        }
#pragma unroll
      for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& y = da[0][n][i];
          y = f[0][n][i] == 0.f ? 0.f : y * f[0][n][i];
          gradients.bias[i / 2] += y;
        }
      if constexpr (!kDelta) {
        if (!p.map.linear())
          ChainSlope<T, W, 1>(da, p.map, tile(L::kProjection), at.feature0, tile(L::kQuery), i0,
                              lane);
        SumTokens<R, W, 1>(gradients.projection, da, ranged(L::kRangedQuery), i0, lane);
      }
      if (sub_chunk.begin > 0) {
        BackwardTile<1>& before = f;  // da of the sub-chunks before this one
        LoadSummed<R, 1, kQueries, C>(before, ranged(L::kSummed), at.feature0, i0, lane);
#pragma unroll
        for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) da[0][n][i] += before[0][n][i];
      }
      StoreSummed<R, 1, kQueries, C>(ranged(L::kSummed), da, at.feature0, i0, lane);
    }
  }

  // The state takes the sub-chunk's keys.
  PERFORMER_DEVICE void UpdateState(State& state, const KeyOperand& kb, const float (&key_sum)[2],
                                    const Position& at) const {
#pragma unroll
    for (int s = 0; s < C / 16; ++s)
#pragma unroll
      for (int n = 0; n < W / 16; ++n) {
        uint32_t b[kFragment<R>];
        LoadBTrans<R, W>(b, ranged(L::kValue), s * 16, n * 16, at.lane);
        Mma<R>(state.sum[2 * n], state.sum[2 * n + 1], kb[s], b);
      }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      state.mass[e] += key_sum[e];
      state.anchor[e] = ZeroIfNone(state.anchor[e]);
    }
  }

  // delta += the sum of da over features.
  PERFORMER_DEVICE void StoreCorrectedDelta(int first_feature, int chunk, int rows,
                                            const Position& at) const {
    if (at.part > 0) return;
    float total[2] = {};
    TotalOfFeatures<R, L::kFeatures, C>(total, ranged(L::kSummed), at.row0, at.lane);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int r = at.row0 + at.lane / 4 + 8 * e, row = chunk * C + r;
      const float all = QuadSum(total[e]);
      if (row >= rows || at.lane % 4 != 0) continue;
      float* const to = pointers()->corrected_delta + static_cast<int64_t>(row) * heads();
      *to = (first_feature == 0 ? floats(L::kDelta)[r] : *to) + all;
    }
  }

  PERFORMER_DEVICE void StoreGradQuery(int first_feature, int chunk, int rows,
                                       const Position& at) const {
#pragma unroll 1
    for (int i = 0; i < L::kWarpColumns; i += L::kColumns) {
      const int c0 = at.part * L::kWarpColumns + i;
      float dq[L::kColumns / 8][4] = {}, unused[2];
      SumFeatures<R, W, L::kFeatures, L::kColumns, false, C>(
          dq, unused, ranged(L::kSummed), ranged(L::kRangedProjection), at.row0, c0, at.lane);
      StoreRowGradient<T, W, L::kColumns>(pointers()->grad_query, p.grad_query,
                                          pointers()->sum_query, dq, p.map.root,
                                          chunk * C + at.row0, rows, c0, first_feature == 0,
                                          first_feature + L::kFeatures >= features(), at.lane);
    }
  }

  // The sums over tokens.
  PERFORMER_DEVICE void StoreGradients(const Gradients& gradients, int first_feature,
                                       int tid) const {
    const int lane = tid % 32, feature0 = first_feature + tid / 32 * 16;
    const int64_t part = static_cast<int64_t>(blockIdx.x) * heads() + blockIdx.y;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int feature = feature0 + lane / 4 + 8 * e;
      const float all = QuadSum(gradients.bias[e]);
      if (lane % 4 == 0 && feature < features())
        p.part_feature_bias[part * features() + feature] = all;
    }
    StoreSums<W, 1>(p.part_projection + part * features() * p.query.width, p.query.width,
                    features(), feature0, gradients.projection, p.map.root, lane);
  }
};

template <class T, int W, int kWarps, bool kDelta>
PERFORMER_DEVICE void CausalDq(const CausalDqParams<T>& p) {
  using Block = CausalDqBlock<T, W, kWarps, kDelta>;
  using L = typename Block::L;
  using R = Ranged<T>;
  constexpr int C = L::kRows, kThreads = L::kThreads;
  PERFORMER_SHARED_MEMORY(shared);
  const Block block = {{p, shared, {p.map, p.map.unit()}}};
  const int tid = threadIdx.x, features = block.features();
  R* const pair_rest = kIs16Bit<T> ? block.ranged(L::kPairRest) : nullptr;

  if (tid == 0) block.StorePointers();
  KeyStream<T, W, kThreads, C> stream(p.keys, p.map, GetWorkTile(p.work, blockIdx.x),
                                      blockIdx.y / (block.heads() / p.groups), shared + L::kStream,
                                      tid);
  const int rows = stream.pointers->rows, chunks = static_cast<int>(CeilDiv(rows, C));

#pragma unroll 1
  for (int first_feature = 0; first_feature < features; first_feature += L::kFeatures) {
    __syncthreads();  // nobody reads the last features any more
    block.LoadProjection(first_feature, tid);
    stream.LoadKeyBias(0, tid);
    typename Block::State state;
    typename Block::Gradients gradients;
    float feature_bias[2];
    block.LoadState(state, feature_bias, first_feature, tid);

#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      stream.StoreKeyBias(0, tid);
      __syncthreads();  // [0] nobody reads the last chunk any more
      block.LoadChunk(stream, chunk, rows, tid);
      __syncthreads();  // [1] the chunk is complete
      if constexpr (!kIs16Bit<T>)
        if (chunk == kTile / C) block.MoveOrigin(state, tid);
      const typename Block::Position at(tid);
      StorePairGradients<T, W, L::kPairColumns>(
          block.ranged(L::kPairs), pair_rest, block.ranged(L::kGradOut), block.ranged(L::kValue),
          block.floats(L::kDelta), at.row0, at.part * L::kPairColumns, at.lane);
      __syncthreads();  // [2] dA is visible
#pragma unroll 1
      for (SubChunk sub_chunk = {0, 0}; sub_chunk.end < C;) {
        typename Block::KeyOperand kb;
        float key_sum[2];
        block.TakeKeys(kb, key_sum, state, sub_chunk, first_feature, stream.bias, at);
        // Phases compute their position again, so that it takes no register meanwhile.
        block.TakeQueries(gradients, state, kb, sub_chunk, feature_bias,
                          typename Block::Position(tid));
        block.UpdateState(state, kb, key_sum, typename Block::Position(tid));
      }
      __syncthreads();  // [3] da is visible
      if constexpr (kDelta)
        block.StoreCorrectedDelta(first_feature, chunk, rows, typename Block::Position(tid));
      else
        block.StoreGradQuery(first_feature, chunk, rows, typename Block::Position(tid));
    }
    if constexpr (!kDelta) block.StoreGradients(gradients, first_feature, tid);
  }
}

template <class T, int W, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 1) CausalDqKernel(CausalDqParams<T> p) {
  CausalDq<T, W, kWarps, false>(p);
}

// Runs before that kernel in 16 bits, and only corrects delta. What the forward pass rounded in
// another way than the gradient does would be the largest part of the gradient's error: with the
// corrected delta the sum of a row's da over all features is 0, as it should be.
template <class T, int W, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 1) CausalDeltaKernel(CausalDqParams<T> p) {
  CausalDq<T, W, kWarps, true>(p);
}

}  // namespace cuda
}  // namespace performer
