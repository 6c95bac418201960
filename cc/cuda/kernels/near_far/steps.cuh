// What the kernels of near-and-far attention and of its gradient share: a block has a tile of up to
// kTile query rows of one block of positions, and walks the features and then the near keys of
// these rows, 64 at a time. Logits of both are relative to one number: from log-features the norm
// of the query is subtracted, and near logits have the factor of the scale.
//
// The state of far keys comes in parts: that before the split of the block before, the checkpoint
// before that block (near_far/block_states.cuh), and likewise, unless causal, behind the next
// block. They are merged in shared memory, a feature block at a time.
#pragma once
#include "cuda/device/row_pipeline.cuh"
#include "cuda/kernels/causal/layout.cuh"
#include "cuda/kernels/near_far/geometry.cuh"

namespace performer {
namespace cuda {

// The states on one side of all blocks: those that splits begin with, and checkpoints.
template <class T>
struct FarSide {
  const T* operand = nullptr;       // [.., G, M_pad, W]
  const float* log_mass = nullptr;  // [.., G, M], in nats
  bool each = false;                // a state for each split; otherwise for each sequence
  int64_t count = 0;                // of states for sequences: 0 (all are empty), 1 or N
  Checkpoints<T> checkpoints;       // [blocks, G, M_pad(, W)]
};

// Of a kernel whose blocks walk features and near keys.
template <class T>
struct NearFarStepsParams : QueryParams<T> {
  KeyParams<T> keys;
  Projection<T> projection;  // of queries
  NearFarGeometry geometry;
  FarSide<T> before, after;  // after: of no use if causal
  bool query_norm = false;
  float log_features = 0;  // log M
};

// One part of the state of far keys. nullptr where it is empty.
template <class T>
struct FarPart {
  const T* mean = nullptr;          // [M_pad, W]
  const float* log_mass = nullptr;  // [M] or [M_pad]
};

// Of a block, in shared memory, as KeyPointers. Row r of the tile is a query in begin <= r < end.
template <class T>
struct NearFarPointers {
  static constexpr int kParts = 4;  // before: splits, checkpoint; after: checkpoint, splits
  const T* query;                   // the row `begin`
  int64_t row;                      // its number in the tensor
  int64_t sequence, block;          // the block of positions, in its sequence
  const T* projection;              // [M_pad, W]: of queries
  const float* feature_bias;        // [M]
  FarPart<T> far[kParts];
  const T *key, *value;   // the first near key
  const float* key_bias;  // likewise
  int begin, end;
  int seen;   // near keys that all rows see
  int tiles;  // of these
  int own;    // of causal calls: where the tile's own keys begin, counted from the first near key
};

// The two parts of the state on one side, after `walked` blocks in the direction of that side.
// block: where the checkpoint is.
template <class T, int W>
PERFORMER_DEVICE void FindFarParts(const FarSide<T>& side, const WorkTiles& splits,
                                   const WorkTile& work, int64_t blocks_of_split, int64_t walked,
                                   int64_t block, int64_t group, int64_t groups, int64_t features,
                                   int64_t features_pad, FarPart<T>* of_splits,
                                   FarPart<T>* checkpoint) {
  const int64_t split = walked / blocks_of_split;
  const int64_t state = (side.each         ? FirstWorkTile(splits, work.sequence) + split
                         : side.count == 1 ? 0
                                           : work.sequence) *
                            groups +
                        group;
  if (side.each || side.count > 0)
    *of_splits = {side.operand + state * features_pad * W, side.log_mass + state * features};
  const int64_t row = (block * groups + group) * features_pad;
  if (walked % blocks_of_split != 0)
    *checkpoint = {side.checkpoints.mean + row * W, side.checkpoints.log_mass + row};
}

// Those of a tile, by its number among the tiles of all blocks. By one thread.
template <class T, int W>
PERFORMER_DEVICE NearFarPointers<T> MakeNearFarPointers(const NearFarStepsParams<T>& p,
                                                        int64_t number, int64_t head) {
  const NearFarGeometry& geometry = p.geometry;
  const int64_t window = geometry.window, phase = geometry.phase;
  const int64_t tiles = CeilDiv(window, kTile), slot = number / tiles;
  const WorkTile work = GetWorkTile(p.work, slot);
  const NearFarSequence sequence = GetNearFarSequence(geometry, work);
  const int64_t block = work.index, heads = p.query.heads;
  const int64_t group = head / (heads / p.groups);
  // Key rows of the sequence: those of the tile, those with queries, the near ones.
  const int64_t first = block * window + number % tiles * kTile - phase;
  const int64_t block_end = (block + 1) * window - phase;
  int64_t end = first + kTile < block_end ? first + kTile : block_end;
  if (end > sequence.rows) end = sequence.rows;
  int64_t begin = first > sequence.hidden ? first : sequence.hidden;
  if (begin < 0) begin = 0;
  NearFarPointers<T> to = {};
  if (begin >= end) return to;
  const int64_t near = block > 0 ? (block - 1) * window - phase : 0, low = near < 0 ? 0 : near;
  int64_t seen_end = block_end + window;
  if (seen_end > sequence.rows) seen_end = sequence.rows;
  if (geometry.causal) seen_end = first < 0 ? 0 : first;

  const int64_t query = sequence.query_row + begin - sequence.hidden;
  to.query = p.query.Row(query, head);
  to.row = query;
  to.sequence = work.sequence;
  to.block = block;
  to.projection =
      p.projection.At(QueryHeadIndex(p.projection.heads, head, heads, group), p.features_pad, W);
  to.feature_bias =
      p.feature_bias + QueryHeadIndex(p.feature_bias_heads, head, heads, group) * p.features;
  const int64_t blocks_of_split = WorkTileRows(geometry.splits, work.rows) / window;
  FindFarParts<T, W>(p.before, geometry.splits, work, blocks_of_split, block > 0 ? block - 1 : 0,
                     slot - (block > 0), group, p.groups, p.features, p.features_pad, &to.far[0],
                     &to.far[1]);
  const int64_t behind = sequence.blocks - 2 - block;
  if (!geometry.causal && behind > 0)
    FindFarParts<T, W>(p.after, geometry.splits, work, blocks_of_split, behind, slot + 1, group,
                       p.groups, p.features, p.features_pad, &to.far[3], &to.far[2]);
  const int64_t row = sequence.key_row + low, batch = p.keys.packed ? 0 : work.sequence;
  to.key = p.keys.key.Row(row, group);
  to.value = p.keys.value.Row(row, group);
  to.key_bias = p.keys.bias.data + batch * p.keys.bias.batch_step + group * p.keys.bias.head_step +
                (p.keys.packed ? row : low) * p.keys.bias.step;
  to.begin = static_cast<int>(begin - first);
  to.end = static_cast<int>(end - first);
  to.seen = static_cast<int>(seen_end - low);
  to.tiles = static_cast<int>(CeilDiv(seen_end - low, kTile));
  to.own = static_cast<int>(first - low);
  return to;
}

// The steps of a block, each over 64 features or near keys. The members are the same for all of its
// threads. Layout says where shared memory has
//
//   kColumns   rows of the projection, or near keys, of kStages steps
//   kValues    means of far keys, or near values, likewise
//   kBehind    means behind the next block, if kCopiesBehind
//   kShares    float4 [2][kTile]: the shares of the parts of a mean
//   kBias      float [kBiases][kTile]: that of a step, and later ones
//   kPointers
template <class T, int W, bool kBoth, class Layout, class Params>
struct NearFarSteps {
  using L = Layout;
  using Pointers = NearFarPointers<T>;
  static constexpr int kChunks = W / kChunk<T>, kStride = L::kThreads / kChunks;

  const Params& p;
  unsigned char* shared;

  PERFORMER_DEVICE T* tile(int offset) const { return reinterpret_cast<T*>(shared + offset); }
  PERFORMER_DEVICE float* floats(int offset) const {
    return reinterpret_cast<float*>(shared + offset);
  }
  PERFORMER_DEVICE float* bias(int step) const {
    return floats(L::kBias) + step % L::kBiases * kTile;
  }
  PERFORMER_DEVICE float4* shares(int step) const {
    return reinterpret_cast<float4*>(shared + L::kShares) + step % 2 * kTile;
  }
  PERFORMER_DEVICE int buffer(int step) const { return step % L::kStages * L::kTileBytes; }
  PERFORMER_DEVICE Pointers& pointers() const {
    return *reinterpret_cast<Pointers*>(shared + L::kPointers);
  }
  PERFORMER_DEVICE int far_steps() const { return static_cast<int>(p.features_pad) / kTile; }
  PERFORMER_DEVICE int steps() const {
    return far_steps() + pointers().tiles + (p.geometry.causal ? 1 : 0);
  }
  PERFORMER_DEVICE bool IsOwn(int step) const {
    return p.geometry.causal && step == far_steps() + pointers().tiles;
  }
  // The first near key of a step, counted as `own`.
  PERFORMER_DEVICE int FirstKey(int step) const {
    return IsOwn(step) ? pointers().own : (step - far_steps()) * kTile;
  }

  // What a column of a step has in global memory: thread tid < kTile loads that of column tid.
  struct Column {
    float far[Pointers::kParts];  // log_mass in units of root
    float bias;                   // likewise, of features and near keys
  };
  PERFORMER_DEVICE void Load(Column& column, int step, int tid) const {
    if (tid >= kTile || step >= steps()) return;
    const Pointers& from = pointers();
    column.bias = -kInfinity;
    if (step < far_steps()) {
      const int feature = step * kTile + tid;
      const bool given = feature < p.features;
#pragma unroll
      for (int i = 0; i < (kBoth ? Pointers::kParts : 2); ++i) {
        const bool is_split = i == 0 || i == 3;
        column.far[i] =
            given && from.far[i].mean != nullptr ? from.far[i].log_mass[feature] : -kInfinity;
        if (is_split) column.far[i] *= p.map.inverse_root;
      }
      if (given) column.bias = (from.feature_bias[feature] - p.log_features) * p.map.inverse_root;
    } else {
      const int key = FirstKey(step) + tid;
      const bool given = IsOwn(step) ? tid < from.end && key >= 0 : key < from.seen;
      if (given)
        column.bias =
            from.key_bias[static_cast<int64_t>(key) * p.keys.bias.step] * p.map.inverse_root;
    }
  }
  // Stores the bias of a column, which is -inf where it weighs nothing, and of a feature the shares
  // of the parts in the mean of far keys.
  PERFORMER_DEVICE void Store(const Column& column, int step, int tid) const {
    if (tid >= kTile || step >= steps()) return;
    float sum = column.bias;
    if (step < far_steps()) {
      const float unit = p.map.unit();
      float larger = fmaxf(column.far[0], column.far[1]);
      if constexpr (kBoth) larger = fmaxf(larger, fmaxf(column.far[2], column.far[3]));
      const float base = ZeroIfNone(larger);
      float share[Pointers::kParts] = {}, mass = 0;
#pragma unroll
      for (int i = 0; i < (kBoth ? Pointers::kParts : 2); ++i)
        mass += share[i] = Exp2((column.far[i] - base) * unit);
      const float inverse = mass == 0.f ? 0.f : 1.f / mass;
      shares(step)[tid] =
          float4{share[0] * inverse, share[1] * inverse, share[2] * inverse, share[3] * inverse};
      sum += base + Log2(mass) * (kLn2 * p.map.inverse_root);
    }
    bias(step)[tid] = sum;
  }

  // Starts the copies of a step. The biases of near keys, which are their masks, must be visible.
  PERFORMER_DEVICE void Issue(int step, int tid) const {
    const Pointers& from = pointers();
    T* const columns = tile(L::kColumns + buffer(step));
    T* const values = tile(L::kValues + buffer(step));
    if (step < far_steps()) {
      const int64_t at = static_cast<int64_t>(step) * kTile * W;
      CopyOperand<T, W, kTile, L::kThreads>(columns, from.projection + at, tid);
      if (from.far[1].mean != nullptr)
        CopyOperand<T, W, kTile, L::kThreads>(values, from.far[1].mean + at, tid);
      if constexpr (kBoth && L::kCopiesBehind)
        if (from.far[2].mean != nullptr)
          CopyOperand<T, W, kTile, L::kThreads>(tile(L::kBehind), from.far[2].mean + at, tid);
    } else {
      const float* const mask = bias(step);
      const auto given = [&](int row) { return mask[row] != -kInfinity; };
      const int first = FirstKey(step);
      CopyRows<T, W, kTile, L::kThreads>(columns, from.key, first, p.keys.key, tid, given);
      CopyRows<T, W, kTile, L::kThreads>(values, from.value, first, p.keys.value, tid, given);
    }
    CpAsyncCommit();
  }

  // sum += share times the numbers at `from`.
  PERFORMER_DEVICE static void AddShare(float (&sum)[kChunk<T>], float share, const uint4& from) {
    const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if constexpr (kIs16Bit<T>) {
        sum[2 * i] += share * Low<T>(words[i]);
        sum[2 * i + 1] += share * High<T>(words[i]);
      } else {
        sum[i] += share * AsFloat(words[i]);
      }
  }
  PERFORMER_DEVICE static uint4 PackChunk(const float (&x)[kChunk<T>]) {
    if constexpr (kIs16Bit<T>)
      return {Pack<T>(x[0], x[1]), Pack<T>(x[2], x[3]), Pack<T>(x[4], x[5]), Pack<T>(x[6], x[7])};
    else
      return {AsBits(x[0]), AsBits(x[1]), AsBits(x[2]), AsBits(x[3])};
  }
  // The mean of far keys of a step's features, from its parts. A thread reads what it copied itself.
  PERFORMER_DEVICE void MergeFar(int step, int tid) const {
    tid = Opaque(tid);
    const int column = tid % kChunks * kChunk<T>, first_row = tid / kChunks;
    const Pointers& from = pointers();
    T* const means = tile(L::kValues + buffer(step));
    const float4* const all = shares(step);
    const int64_t at = static_cast<int64_t>(step * kTile + first_row) * W + column;
    constexpr int kAtOnce = 4;  // loads in flight
    static_assert(kTile / kStride % kAtOnce == 0);
#pragma unroll 1
    for (int n = 0; n < kTile / kStride; n += kAtOnce) {
      uint4 loaded[kAtOnce][2];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int side = 0; side < (kBoth ? 2 : 1); ++side) {
          const T* const mean = from.far[3 * side].mean;
          loaded[i][side] =
              mean == nullptr ? uint4{0, 0, 0, 0}
                              : *reinterpret_cast<const uint4*>(mean + at + (n + i) * kStride * W);
        }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = first_row + (n + i) * kStride, to = At<T, W>(row, column);
        const float4 share = all[row];
        float sum[kChunk<T>] = {};
        AddShare(sum, share.x, loaded[i][0]);
        if (from.far[1].mean != nullptr)
          AddShare(sum, share.y, *reinterpret_cast<const uint4*>(means + to));
        if constexpr (kBoth) {
          if (from.far[2].mean != nullptr)
            AddShare(sum, share.z,
                     *reinterpret_cast<const uint4*>(L::kCopiesBehind ? tile(L::kBehind) + to
                                                                      : from.far[2].mean + at +
                                                                            (n + i) * kStride * W));
          AddShare(sum, share.w, loaded[i][1]);
        }
        *reinterpret_cast<uint4*>(means + to) = PackChunk(sum);
      }
    }
  }
};

}  // namespace cuda
}  // namespace performer
