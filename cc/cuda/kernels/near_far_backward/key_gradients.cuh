// Gradient of near-and-far attention with respect to keys and values, in tiles of up to kTile keys
// of one block of positions. (R, r) is the reverse state of the queries for which the block is far
// (near_far_backward/reverse_states.cuh), `reference` what it is relative to, and queries are those
// for which it is near:
//
//   far    kb = exp(b - reference) <= 1     db = kb (v R^T - r)                 dv += kb R
//   near   P = exp(k q^T + bias - lse)      ds = P (v grad_out^T - delta)       dv += P grad_out
//   dk = root db w - root^2 k sum_m db + root^2 ds q        dbias = sum_m db + sum_i ds
//
// Unless causal there are reverse states on both sides of a block. They are merged in shared
// memory, towards the smaller reference, so that every factor is at most 1.
//
// Grid: (tiles of all blocks, key/value heads, slices). A block walks the features, 64 or 32 at a
// time, and then its near queries, 64 at a time, head by head. A warp owns 16 keys, whose gradients
// stay in registers. Masked keys get exactly 0.
#pragma once
#include "cuda/kernels/near_far_backward/reverse_states.cuh"

namespace performer {
namespace cuda {

// The reverse states of one direction.
template <class T>
struct ReverseSide {
  ReverseCheckpoints<T> checkpoints;  // of all blocks, in the order of their rows
  StatesAfterSplits after;
};

template <class T>
struct NearFarKeyGradientsParams : CallParams {  // work: the blocks of positions
  KeyParams<T> keys;
  Projection<T> projection;  // of keys
  NearFarGeometry geometry;
  RowsOf<const T> query;         // [B L, H, D]
  RowsOf<const T> grad_out;      // [B L, H, E]
  RowStatistics statistics;      // [B L, H], of near logits
  ReverseSide<T> before, after;  // of the directions in which states are before and after blocks
  RowsOf<T> grad_key;            // [B S, G, D]
  RowsOf<T> grad_value;          // [B S, G, E]
  float* grad_bias = nullptr;    // [B, G, S] or nullptr
  int64_t bias_rows = 0;         // S
};

// The reverse state of one direction for a block of keys: the checkpoint, and what is after the
// split. nullptr where there is none.
template <class T>
struct ReversePart {
  const ReverseNumber<T>*sum = nullptr, *after = nullptr;  // [M_pad, W]
  // [kReverseNumbers, M_pad], [kAfterNumbers, M_pad]: see ReverseCheckpoints, StatesAfterSplits
  const float *numbers = nullptr, *after_numbers = nullptr;
};

// In shared memory. Rows are those of a tile of keys, the first of which is row 0.
template <class T>
struct NearFarKeyPointers {
  T *grad_key, *grad_value;  // [rows, G, D or E], at the block's head
  float* grad_bias;          // [rows], or nullptr
  const T* projection;       // [M_pad, W]
  ReversePart<T> before, after;
  const T *query, *grad_out;  // [rows, H, D or E], from the group's first head on: near queries
  RowStatistics statistics;   // [rows, H], likewise
  int queries;                // how many
  int first_query;            // the first of them, in rows of the tile
};

// A block walks steps of kFeatures features or of kTile near queries.
template <class T, int W, bool kBoth>
struct NearFarKeyLayout {
  using R = Ranged<T>;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static_assert(kTile == 16 * kWarps && kTile == kFeatureUnit, "a warp has 16 keys");
  static constexpr int kStages = kIs16Bit<T> && W == 64 ? 2 : 1;
  static constexpr int kFeatures = kIs16Bit<T> && W > 128 ? kTile / 2 : kTile;
  static_assert(kFeatureUnit % kFeatures == 0);
  // How many numbers R is the sum of in shared memory: in 16 bits R . v, which nearly cancels
  // against r, needs more bits than bfloat16 has.
  static constexpr int kParts = kIs16Bit<T> ? 2 : 1;

  // Shared memory, in bytes.
  static constexpr int kTileBytes = kTile * W * static_cast<int>(sizeof(T));
  static constexpr int kKey = 0;
  static constexpr int kValue = kTileBytes;
  // [kStages] of the projection [kFeatures][W] and R [kParts][kFeatures][W], or of queries and
  // grad_out
  static constexpr int kStage = kValue + kTileBytes;
  static constexpr int kFarBytes = (1 + kParts) * (kTileBytes / kTile * kFeatures);
  static constexpr int kStageBytes = kFarBytes > 2 * kTileBytes ? kFarBytes : 2 * kTileBytes;
  static constexpr int kFactors = kStage + kStages * kStageBytes;  // float4 [2][kTile], see Column
  static constexpr int kNumbers = kFactors + 2 * kTile * 16;       // float2 [4][kTile], likewise
  static constexpr int kRowMax = kNumbers + 4 * kTile * 8;         // float [2][kTile] each
  static constexpr int kDelta = kRowMax + 2 * kTile * 4;
  static constexpr int kLogSum = kDelta + 2 * kTile * 4;
  static constexpr int kStream = kLogSum + (kKeepsLogSum<T> ? 2 * kTile * 4 : 0);
  static constexpr int kPointers = kStream + KeyStream<T, W, kThreads>::kSharedBytes;
  static constexpr int kBytes = kPointers + static_cast<int>(sizeof(NearFarKeyPointers<T>));
  static_assert(kStream % 8 == 0 && kPointers % 8 == 0 && kBytes <= MaxSharedBytes(W, kWarps));
};

// The rows of a tile of keys, by its number among the tiles of all blocks; `block`: of positions,
// in its sequence. begin and end are rows of the sequence, the same where the tile has none; `rows`
// are positions.
PERFORMER_DEVICE WorkTile GetKeyTile(const NearFarGeometry& geometry, int64_t number,
                                     NearFarSequence* sequence, int64_t* block) {
  const int64_t tiles = CeilDiv(geometry.window, kTile);
  WorkTile work = GetWorkTile(geometry.blocks, number / tiles);
  *sequence = GetNearFarSequence(geometry, work);
  *block = work.index;
  const int64_t first = work.index * geometry.window - geometry.phase;
  const int64_t begin = first + number % tiles * kTile, block_end = first + geometry.window;
  int64_t end = begin + kTile < block_end ? begin + kTile : block_end;
  if (end > sequence->rows) end = sequence->rows;
  work.first_row = sequence->key_row;
  work.begin = begin < 0 ? 0 : begin;
  work.end = end > work.begin ? end : work.begin;
  return work;
}

// One direction's part for a block of keys, which is number `walked` in it. `slot`: of the block
// among those of all sequences.
template <class T, int W>
PERFORMER_DEVICE ReversePart<T> FindReversePart(const ReverseSide<T>& side, const CallParams& p,
                                                const WorkTiles& splits, const WorkTile& work,
                                                int64_t blocks_of_split, int64_t walked,
                                                int64_t slot, int64_t group) {
  if (side.checkpoints.sum == nullptr) return {};
  const int64_t split = FirstWorkTile(splits, work.sequence) + walked / blocks_of_split;
  const int64_t at = slot * p.groups + group, after = split * p.groups + group;
  const int64_t pad = p.features_pad;
  return {side.checkpoints.sum + at * pad * W,
          static_cast<const ReverseNumber<T>*>(side.after.sum) + after * pad * W,
          side.checkpoints.numbers + at * kReverseNumbers * pad,
          side.after.numbers + after * kAfterNumbers * pad};
}

template <class T, int W>
PERFORMER_DEVICE NearFarKeyPointers<T> MakeNearFarKeyPointers(const NearFarKeyGradientsParams<T>& p,
                                                              const WorkTile& work,
                                                              const NearFarSequence& sequence,
                                                              int64_t block, int64_t slot,
                                                              int64_t group) {
  const NearFarGeometry& geometry = p.geometry;
  const int64_t window = geometry.window, heads = p.query.heads, head = group * (heads / p.groups);
  const int64_t row = work.first_row + work.begin, batch = p.keys.packed ? 0 : work.sequence;
  NearFarKeyPointers<T> to = {};
  to.grad_key = p.grad_key.Row(row, group);
  to.grad_value = p.grad_value.Row(row, group);
  if (p.grad_bias != nullptr)
    to.grad_bias = p.grad_bias + (batch * p.groups + group) * p.bias_rows +
                   (p.keys.packed ? work.first_row : 0) + work.begin;
  to.projection = p.projection.At(p.projection.heads == 1 ? 0 : group, p.features_pad, W);
  const int64_t blocks_of_split = WorkTileRows(geometry.splits, work.rows) / window;
  if (block < LastReverseBlock(geometry, sequence))
    to.before = FindReversePart<T, W>(p.before, p, geometry.splits, work, blocks_of_split, block,
                                      slot, group);
  if (!geometry.causal)
    to.after = FindReversePart<T, W>(p.after, p, geometry.splits, work, blocks_of_split,
                                     sequence.blocks - 1 - block, slot, group);

  // Near queries, in key rows of the sequence.
  int64_t begin = geometry.causal ? work.begin : (block - 1) * window - geometry.phase;
  int64_t end = (block + 2) * window - geometry.phase;
  const int64_t lowest = sequence.hidden < 0 ? 0 : sequence.hidden;
  if (begin < lowest) begin = lowest;
  if (end > sequence.rows) end = sequence.rows;
  if (end < begin) end = begin;
  const int64_t query = sequence.query_row + begin - sequence.hidden;
  to.query = p.query.Row(query, head);
  to.grad_out = p.grad_out.Row(query, head);
  to.statistics = StatisticsFrom<T>(p.statistics, query * heads + head);
  to.queries = static_cast<int>(end - begin);
  to.first_query = static_cast<int>(begin - work.begin);
  return to;
}

// What one block does. A warp has 16 keys from row0 on, of which a thread has rows g and g + 8.
template <class T, int W, bool kBoth>
struct NearFarKeyBlock {
  using L = NearFarKeyLayout<T, W, kBoth>;
  using R = Ranged<T>;
  static constexpr int kThreads = L::kThreads;
  // Features or queries whose products are in registers at a time.
  static constexpr int kStep = kIs16Bit<T> && W == 64 ? 32 : 16;
  using Step = float[kStep / 8][4];

  const NearFarKeyGradientsParams<T>& p;
  unsigned char* shared;

  // The gradients of the warp's keys. total: this lane's shares of the sums of db, and of ds.
  struct Sums {
    float key[kSlice<W> / 8][4] = {}, value[kSlice<W> / 8][4] = {};
    float far_total[2] = {}, near_total[2] = {};
  };

  PERFORMER_DEVICE T* tile(int offset) const { return reinterpret_cast<T*>(shared + offset); }
  PERFORMER_DEVICE float* floats(int offset) const {
    return reinterpret_cast<float*>(shared + offset);
  }
  PERFORMER_DEVICE NearFarKeyPointers<T>& pointers() const {
    return *reinterpret_cast<NearFarKeyPointers<T>*>(shared + L::kPointers);
  }
  PERFORMER_DEVICE static int begin() { return SliceBegin<W>(blockIdx.z); }
  PERFORMER_DEVICE int each() const { return static_cast<int>(p.query.heads / p.groups); }
  PERFORMER_DEVICE int far_steps() const {
    return pointers().before.sum == nullptr && pointers().after.sum == nullptr
               ? 0
               : static_cast<int>(p.features_pad) / L::kFeatures;
  }
  PERFORMER_DEVICE int query_tiles() const {
    return static_cast<int>(CeilDiv(pointers().queries, kTile));
  }
  // The projection, or queries, of a step; R, or grad_out.
  PERFORMER_DEVICE T* columns(int step) const {
    return tile(L::kStage + step % L::kStages * L::kStageBytes);
  }
  PERFORMER_DEVICE T* grad_out(int step) const { return columns(step) + kTile * W; }
  PERFORMER_DEVICE R* reverse(int step, int part) const {
    return reinterpret_cast<R*>(columns(step) + (1 + part) * L::kFeatures * W);
  }
  PERFORMER_DEVICE float4* factors(int step) const {
    return reinterpret_cast<float4*>(shared + L::kFactors) + step % 2 * kTile;
  }
  // Of a feature: what its reverse state is relative to, and r.
  PERFORMER_DEVICE float2* numbers(int step) const {
    return reinterpret_cast<float2*>(shared + L::kNumbers) + step % 4 * kTile;
  }

  // What a feature of a step has in global memory: thread tid < kFeatures loads that of column tid.
  struct Column {
    float mass[2], reference[2], factor[2];                   // of the checkpoints
    float after_mass[2], after_log_mass[2], after_factor[2];  // of what is after the splits
  };
  PERFORMER_DEVICE void Load(Column& column, int step, int far, int tid) const {
    if (tid >= L::kFeatures || step >= far) return;
    const int64_t pad = p.features_pad, feature = static_cast<int64_t>(step) * L::kFeatures + tid;
#pragma unroll
    for (int side = 0; side < (kBoth ? 2 : 1); ++side) {
      const ReversePart<T>& from = side == 0 ? pointers().before : pointers().after;
      column.reference[side] = kInfinity;
      if (from.sum == nullptr) continue;
      column.mass[side] = from.numbers[feature];
      column.reference[side] = from.numbers[pad + feature];
      column.factor[side] = from.numbers[2 * pad + feature];
      column.after_mass[side] = from.after_numbers[feature];
      column.after_log_mass[side] = from.after_numbers[2 * pad + feature];
      column.after_factor[side] = from.after_numbers[4 * pad + feature];
    }
  }
  // Stores what the parts of R are multiplied by: the checkpoint and what is after the split, of
  // each direction. And the numbers of both together.
  PERFORMER_DEVICE void Store(const Column& column, int step, int far, int tid) const {
    if (tid >= L::kFeatures || step >= far) return;
    float reference = column.reference[0];
    if constexpr (kBoth) reference = fminf(reference, column.reference[1]);
    float of_checkpoint[2] = {}, of_after[2] = {}, mass = 0;
#pragma unroll
    for (int side = 0; side < (kBoth ? 2 : 1); ++side) {
      const float own = column.reference[side], after = column.after_log_mass[side];
      if (own == kInfinity) continue;
      const float share = Exp2((reference - own) * p.map.unit());
      const float keep = after == -kInfinity ? 0.f : share * Exp2((own - after) * p.map.unit());
      mass += share * column.mass[side] + keep * column.after_mass[side];
      of_checkpoint[side] = share * column.factor[side];
      of_after[side] = keep * column.after_factor[side];
    }
    factors(step)[tid] = float4{of_checkpoint[0], of_after[0], of_checkpoint[1], of_after[1]};
    numbers(step)[tid] = float2{reference, mass};
  }

  PERFORMER_DEVICE void IssueFeatures(int step, int tid) const {
    const int64_t at = static_cast<int64_t>(step) * L::kFeatures * W;
    CopyOperand<T, W, L::kFeatures, kThreads>(columns(step), pointers().projection + at, tid);
    if (const ReverseNumber<T>* const sum = pointers().before.sum; sum != nullptr)
      CopyOperand<ReverseNumber<T>, W, L::kFeatures, kThreads>(
          reinterpret_cast<ReverseNumber<T>*>(reverse(step, 0)), sum + at, tid);
    CpAsyncCommit();
  }
  // `number`: of the step among those with queries.
  PERFORMER_DEVICE void IssueQueries(int step, int number, int tid) const {
    const NearFarKeyPointers<T>& from = pointers();
    const int tiles = query_tiles(), head = number / tiles, first = number % tiles * kTile;
    const auto valid = [&](int r) { return first + r < from.queries; };
    CopyRows<T, W, kTile, kThreads>(columns(step), from.query + head * p.query.width, first,
                                    p.query, tid, valid);
    CopyRows<T, W, kTile, kThreads>(grad_out(step), from.grad_out + head * p.grad_out.width, first,
                                    p.grad_out, tid, valid);
    CpAsyncCommit();
    if (tid < kTile)
      LoadStatistics<T>(floats(L::kRowMax), floats(L::kLogSum), floats(L::kDelta),
                        step % 2 * kTile + tid, from.statistics,
                        static_cast<int64_t>(first + tid) * p.query.heads + head, valid(tid));
  }

  // R of a step from its parts. A thread reads what it copied itself.
  PERFORMER_DEVICE void MergeReverse(int step, int tid) const {
    using N = ReverseNumber<T>;
    static_assert(kChunk<N> == kChunk<R>);
    constexpr int kChunks = W / kChunk<R>, kStride = kThreads / kChunks;
    tid = Opaque(tid);
    const int column = tid % kChunks * kChunk<R>, first_row = tid / kChunks;
    const NearFarKeyPointers<T>& from = pointers();
    R* const high = reverse(step, 0);
    [[maybe_unused]] R* const low = reverse(step, L::kParts - 1);
    const int64_t first = (static_cast<int64_t>(step) * L::kFeatures + first_row) * W + column;
    const auto load = [&](const N* part, int row) {
      return part == nullptr ? uint4{0, 0, 0, 0}
                             : *reinterpret_cast<const uint4*>(part + first + row * kStride * W);
    };
    constexpr int kAtOnce = 2;  // rows whose loads are in flight
#pragma unroll 1
    for (int n = 0; n < L::kFeatures / kStride; n += kAtOnce) {
      uint4 after[kAtOnce], behind[kAtOnce], after_behind[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        after[i] = load(from.before.after, n + i);
        if constexpr (kBoth) {
          behind[i] = load(from.after.sum, n + i);
          after_behind[i] = load(from.after.after, n + i);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = first_row + (n + i) * kStride, to = At<R, W>(row, column);
        const float4 factor = factors(step)[row];
        float sum[kChunk<R>] = {};
        if (from.before.sum != nullptr)
          AddScaled(sum, factor.x, *reinterpret_cast<const uint4*>(high + to));
        AddScaled(sum, factor.y, after[i]);
        if constexpr (kBoth) {
          AddScaled(sum, factor.z, behind[i]);
          AddScaled(sum, factor.w, after_behind[i]);
        }
        StoreParts(high + to, low + to, sum);
      }
    }
  }

  // x += the product of the warp's rows of `rows` and kStep of `columns`.
  PERFORMER_DEVICE static void Product(Step& x, const T* rows, const T* columns, int row0,
                                       int lane) {
#pragma unroll(kUnroll<T>)
    for (int s = 0; s < W / 16; ++s) {
      uint32_t a[kFragment<T>];
      LoadA<T, W>(a, rows, row0, s * 16, lane);
#pragma unroll
      for (int n = 0; n < kStep / 16; ++n) {
        uint32_t b[kFragment<T>];
        LoadB<T, W>(b, columns, n * 16, s * 16, lane);
        Mma<T>(x[2 * n], x[2 * n + 1], a, b);
      }
    }
  }
  // x += v R^T. What R and values have in parts is taken in parts: the product nearly cancels
  // against r.
  PERFORMER_DEVICE void ReverseProduct(Step& x, int step, int first, int row0, int lane) const {
#pragma unroll(kUnroll<T>)
    for (int s = 0; s < W / 16; ++s) {
      uint32_t value[kFragment<T>], a[kFragment<R>];
      LoadA<T, W>(value, tile(L::kValue), row0, s * 16, lane);
#pragma unroll
      for (int i = 0; i < kFragment<T>; ++i) a[i] = value[i];
      MakeRangedOperand<T>(a);
#pragma unroll
      for (int n = 0; n < kStep / 16; ++n)
#pragma unroll
        for (int part = L::kParts - 1; part >= 0; --part) {  // the small one first
          uint32_t b[kFragment<R>];
          LoadB<R, W>(b, reverse(step, part) + first * W, n * 16, s * 16, lane);
          if constexpr (kHasRanged<T>)
            if (part == 0) {
              uint32_t rest[kFragment<R>];
              RangedRest<T>(rest, value, a);
              Mma<R>(x[2 * n], x[2 * n + 1], rest, b);
            }
          Mma<R>(x[2 * n], x[2 * n + 1], a, b);
        }
    }
  }

  // The warp's keys and kStep features of a step, from `first` on. bias: of keys.
  PERFORMER_DEVICE void TakeFeatures(Sums& sums, const float* bias, int step, int first, int row0,
                                     int lane) const {
    const int g = lane / 4, t = lane % 4;
    const float unit = p.map.unit();
    const float2* const number = numbers(step) + first;
    Step x = {}, y;
    Product(x, tile(L::kKey), columns(step) + first * W, row0, lane);
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 of = number[n * 8 + 2 * t + (i & 1)];
        x[n][i] = Exp2((x[n][i] + (bias[row0 + g + i / 2 * 8] - of.x)) * unit);
        y[n][i] = -of.y;
      }
    ReverseProduct(y, step, first, row0, lane);
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) y[n][i] = x[n][i] == 0.f ? 0.f : x[n][i] * y[n][i];
#pragma unroll
    for (int s = 0; s < kStep / 16; ++s) {
      uint32_t kb[kFragment<R>], db[kFragment<R>];
      PackA<R>(kb, x[2 * s], x[2 * s + 1]);
      PackA<R>(db, y[2 * s], y[2 * s + 1]);
      // Of the operand as it is rounded: the errors cancel in dk.
#pragma unroll
      for (int e = 0; e < 2; ++e) sums.far_total[e] += OperandSum<R>(db, e);
      SumColumns<R, R>(sums.value, kb, reverse(step, 0), first + s * 16, lane);
      SumColumns<R, T>(sums.key, db, columns(step), first + s * 16, lane);
    }
  }

  // The warp's keys and kStep queries of a step, from `first` on. offset: the first query of the
  // step, in rows of the tile. bias: key_bias, in units of root.
  PERFORMER_DEVICE void TakeQueries(Sums& sums, const float (&bias)[2], int step, int first,
                                    int offset, int row0, int lane) const {
    // Above the triangle. (In float32, where registers are short, the products are of zeros.)
    if (kIs16Bit<T> && p.geometry.causal && offset + first + kStep <= row0) return;
    const int g = lane / 4, t = lane % 4, at = step % 2 * kTile + first;
    const float unit = p.map.unit();
    Step x = {}, y;
    Product(x, tile(L::kKey), columns(step) + first * W, row0, lane);
    const bool some = p.geometry.causal && offset + first < row0 + 15;
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = n * 8 + 2 * t + (i & 1);
        x[n][i] =
            RowWeight<T>(p.map.root * x[n][i] + (bias[i / 2] - floats(L::kRowMax)[at + query]),
                         floats(L::kLogSum), at + query, unit);
        if (some && offset + first + query < row0 + g + i / 2 * 8) x[n][i] = 0.f;
        y[n][i] = -floats(L::kDelta)[at + query];
      }
    Product(y, tile(L::kValue), grad_out(step) + first * W, row0, lane);
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        y[n][i] = x[n][i] == 0.f ? 0.f : x[n][i] * y[n][i];
        sums.near_total[i / 2] += y[n][i];
      }
#pragma unroll
    for (int s = 0; s < kStep / 16; ++s) {
      uint32_t weight[kFragment<T>], ds[kFragment<R>];
      PackA<T>(weight, x[2 * s], x[2 * s + 1]);
      PackA<R>(ds, y[2 * s], y[2 * s + 1]);
      SumColumns<T, T>(sums.value, weight, grad_out(step), first + s * 16, lane);
      SumColumns<R, T>(sums.key, ds, columns(step), first + s * 16, lane);
    }
  }

  // key_bias: of the tile's keys, as given.
  PERFORMER_DEVICE void Write(const Sums& sums, const float* key_bias, int row0, int rows,
                              int lane) const {
    const NearFarKeyPointers<T>& to = pointers();
    const float scale = p.map.root * p.map.root;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float far_total = QuadSum(sums.far_total[e]), near_total = QuadSum(sums.near_total[e]);
      const int row = row0 + lane / 4 + 8 * e;
      if (row >= rows) continue;
      const bool masked = key_bias[row] == -kInfinity;
      if (to.grad_bias != nullptr && begin() == 0 && lane % 4 == 0)
        to.grad_bias[row] = masked ? 0.f : far_total + near_total;
      const float norm = p.map.key_norm ? far_total : 0.f;
      T* const key_row = to.grad_key + static_cast<int64_t>(row) * p.grad_key.stride;
      T* const value_row = to.grad_value + static_cast<int64_t>(row) * p.grad_value.stride;
#pragma unroll
      for (int n = 0; n < kSlice<W> / 8; ++n) {
        const int column = begin() + n * 8 + 2 * (lane % 4);
        float2 k = {0.f, 0.f};
        if (norm != 0.f) k = LoadPair(tile(L::kKey) + AtPair<T, W>(row, column / 8, lane % 4));
        float2 x = {(sums.key[n][2 * e] - norm * k.x) * scale,
                    (sums.key[n][2 * e + 1] - norm * k.y) * scale};
        float2 y = {sums.value[n][2 * e], sums.value[n][2 * e + 1]};
        if (masked) x = y = float2{0.f, 0.f};
        StoreColumns(key_row, column, p.grad_key.width, p.grad_key.aligned, x.x, x.y);
        StoreColumns(value_row, column, p.grad_value.width, p.grad_value.aligned, y.x, y.y);
      }
    }
  }

 private:
  // sum += x (16 of the summed index) times rows first .. first + 15 of a tile of N, as operands in
  // M.
  template <class M, class N>
  PERFORMER_DEVICE static void SumColumns(float (&sum)[kSlice<W> / 8][4],
                                          const uint32_t (&x)[kFragment<M>], const N* tile,
                                          int first, int lane) {
#pragma unroll
    for (int n = 0; n < kSlice<W> / 16; ++n) {
      uint32_t b[kFragment<N>];
      if constexpr (!kIs16Bit<M>) lane = Opaque(lane);  // registers are short
      LoadBTrans<N, W>(b, tile, first, begin() + n * 16, lane);
      if constexpr (!std::is_same_v<M, N>) MakeRangedOperand<N>(b);
      Mma<M>(sum[2 * n], sum[2 * n + 1], x, b);
    }
  }

  PERFORMER_DEVICE static void AddScaled(float (&sum)[kChunk<R>], float factor, const uint4& from) {
    float x[kChunk<R>];
    UnpackChunk<ReverseNumber<T>>(x, from, factor);
#pragma unroll
    for (int i = 0; i < kChunk<R>; ++i) sum[i] += x[i];
  }
  PERFORMER_DEVICE static void StoreParts(R* high, R* low, const float (&sum)[kChunk<R>]) {
    uint4 x, y;
    uint32_t* const of_x[4] = {&x.x, &x.y, &x.z, &x.w};
    uint32_t* const of_y[4] = {&y.x, &y.y, &y.z, &y.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if constexpr (kIs16Bit<R>) {
        *of_x[i] = Pack<R>(sum[2 * i], sum[2 * i + 1]);
        *of_y[i] = Pack<R>(sum[2 * i] - Low<R>(*of_x[i]), sum[2 * i + 1] - High<R>(*of_x[i]));
      } else {
        *of_x[i] = AsBits(sum[i]);
      }
    *reinterpret_cast<uint4*>(high) = x;
    if constexpr (kIs16Bit<R>) *reinterpret_cast<uint4*>(low) = y;
  }
};

template <class T, int W, bool kBoth>
__global__ void __launch_bounds__(128, W == 64 ? 2 : 1)
    NearFarKeyGradientsKernel(NearFarKeyGradientsParams<T> p) {
  using Block = NearFarKeyBlock<T, W, kBoth>;
  using L = typename Block::L;
  PERFORMER_SHARED_MEMORY(shared);
  const int tid = threadIdx.x;
  // From a shuffle, so that branches on it are known to be the same for the whole warp.
  const int warp = __shfl_sync(kAllLanes, tid / 32, 0), lane = tid % 32, row0 = warp * 16;
  const Block block = {p, shared};
  NearFarSequence sequence;
  int64_t number;
  const WorkTile work = GetKeyTile(p.geometry, blockIdx.x, &sequence, &number);
  if (work.begin == work.end) return;
  if (tid == 0)  // visible at the first barrier
    block.pointers() = MakeNearFarKeyPointers<T, W>(
        p, work, sequence, number, FirstWorkTile(p.geometry.blocks, work.sequence) + number,
        blockIdx.y);
  KeyStream<T, W, L::kThreads> stream(p.keys, p.map, work, blockIdx.y, shared + L::kStream, tid);
  stream.LoadKeyBias(0, tid);
  stream.StoreKeyBias(0, tid);
  const int far = block.far_steps(), tiles = block.query_tiles();
  const int steps = far + tiles * block.each(), rows = stream.pointers->rows;
  typename Block::Column column = {};
  block.Load(column, 0, far, tid);
  block.Store(column, 0, far, tid);
  block.Load(column, 1, far, tid);
  __syncthreads();  // the mask of the keys, and factors, are visible
  if (steps > 0) stream.Issue(0, 0, block.tile(L::kKey), block.tile(L::kValue), tid);
  const auto issue = [&](int step) {
    if (step < far)
      block.IssueFeatures(step, tid);
    else if (step < steps)
      block.IssueQueries(step, step - far, tid);
  };
  if constexpr (L::kStages == 2) issue(0);
  typename Block::Sums sums;

#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if constexpr (L::kStages == 1) {
      if (step > 0) __syncthreads();  // nobody reads the tiles any more; factors are visible
      issue(step);
    }
    CpAsyncWait<0>();
    if (step == 0) stream.ComputeBias(0, block.tile(L::kKey), tid);
    if (step < far) block.MergeReverse(step, tid);
    block.Store(column, step + 1, far, tid);
    __syncthreads();  // the tiles of the step are complete; the others are free
    if constexpr (L::kStages == 2) issue(step + 1);
    block.Load(column, step + 2, far, tid);
    if (step < far) {
#pragma unroll 1
      for (int first = 0; first < L::kFeatures; first += Block::kStep)
        block.TakeFeatures(sums, stream.bias, step, first, row0, Opaque(lane));
      continue;
    }
    if (step == far && far > 0)  // near logits have one more factor of root
#pragma unroll
      for (int n = 0; n < kSlice<W> / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.key[n][i] *= p.map.inverse_root;
    const float bias[2] = {stream.key_bias[row0 + lane / 4] * p.map.inverse_root,
                           stream.key_bias[row0 + lane / 4 + 8] * p.map.inverse_root};
    const int first_query = (step - far) % tiles * kTile;
    const int queries = min(kTile, block.pointers().queries - first_query);
#pragma unroll 1
    for (int first = 0; first < queries; first += Block::kStep)
      block.TakeQueries(sums, bias, step, first, block.pointers().first_query + first_query, row0,
                        Opaque(lane));
  }
  if (steps == far)  // no near query
#pragma unroll
    for (int n = 0; n < kSlice<W> / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums.key[n][i] *= p.map.inverse_root;
  block.Write(sums, stream.key_bias, row0, rows, Opaque(lane));
}

}  // namespace cuda
}  // namespace performer
