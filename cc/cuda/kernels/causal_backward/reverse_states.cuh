// The reverse state: what later rows ask of earlier keys, the counterpart of a state for gradients.
// At a boundary between rows, where log_mass is that of all keys before it:
//
//   R[m] = sum over later rows i of exp(a[i, m] + log_mass[m] - lse_i) grad_out_i
//   r[m] = the same of delta_i
//
// A key before the boundary gets exp(b - log_mass) (R . v - r) in its log weight, and exp(b -
// log_mass) R in its value. The gradient of the final state is the reverse state after the last
// row, and that before the first row is the gradient of the initial state. Every factor is <= 1.
//
// Reverse states are summed over splits and merged as states are. ReverseStatesKernel walks a split
// from its last row to its first. It stores a checkpoint after every kCheckpointTiles tiles, which
// has the later rows of the split alone, and what all rows of the split add, relative to the state
// before it. MergeReverseStatesKernel adds these up from the last split to the first.
#pragma once
#include "cuda/kernels/causal_backward/common.cuh"

namespace performer {
namespace cuda {

// The reverse state after every kCheckpointTiles tiles of a split, of later rows of the split
// alone.
template <class T>
struct ReverseCheckpoints {
  ReverseNumber<T>* sum = nullptr;  // R [checkpoints, G, M_pad, W], less a factor in 16 bits
  // [checkpoints, G, kReverseNumbers, M_pad]: r; the log_mass that R and r are relative to, in
  // units of root, inf where no key has been seen; the factor of R (HalfScale::from_half).
  float* numbers = nullptr;
};
inline constexpr int kReverseNumbers = 3;

// log_mass of two states together, in units of root.
PERFORMER_DEVICE float MergedLogMass(const Map& map, float x, float y) {
  const float larger = fmaxf(x, y), unit = map.unit();
  if (larger == -kInfinity) return larger;
  return larger +
         Log2(Exp2((x - larger) * unit) + Exp2((y - larger) * unit)) * (kLn2 * map.inverse_root);
}

template <class T>
struct ReverseStatesParams : CausalGradientParams<T> {  // work: the splits
  Projection<T> projection;                             // of queries
  WorkTiles tiles,
      checkpoint_tiles;  // of kTile rows, and of the rows from a checkpoint to the next
  int64_t feature_blocks = 0;
  const float* tile_log_mass = nullptr;  // [tiles, G, M_pad], see causal/layout.cuh
  const float* log_mass = nullptr;       // [N, G, M]: the final state
  ReverseCheckpoints<T> checkpoints;
  float* part_mean = nullptr;  // R [splits, G, M, E]
  float* part_mass = nullptr;  // r [splits, G, M]
};

// The pointers of a block, in shared memory as KeyPointers. Rows start at the split's first row,
// features at the block's.
template <class T>
struct ReverseStatesPointers {
  const T *query, *grad_out;           // [rows, H, D or E], from the group's first head on
  RowStatistics statistics;            // [rows, H], likewise
  const float *before, *after;         // [features]: log_mass before and after the split
  const float* tile_log_mass;          // [tiles, G, M_pad]
  ReverseNumber<T>* sum;               // [checkpoints, G, M_pad, W]
  float* numbers;                      // [checkpoints, G, kReverseNumbers, M_pad]
  const float *origin, *first_origin;  // [W], or nullptr in 16 bits
  int rows;                            // of the split
  int features, padded;                // from the block's first one on: up to M, up to M_pad
};

template <class T, int W>
struct ReverseStatesLayout : BackwardLayout<T, W, 4> {
  using S = BackwardLayout<T, W, 4>;
  static constexpr int kStages = 2;
  static constexpr int kQuery = S::kFeatureBytes;  // after the projection
  static constexpr int kGradOut = kQuery + kStages * S::kTileBytes;
  static constexpr int kRowMax = kGradOut + kStages * S::kTileBytes;  // float [2][kTile]
  static constexpr int kDelta = kRowMax + 2 * kTile * 4;              // likewise
  static constexpr int kLogSum = kDelta + 2 * kTile * 4;              // likewise
  static constexpr int kPointers = kLogSum + (kKeepsLogSum<T> ? 2 * kTile * 4 : 0);
  static constexpr int kBytes = kPointers + static_cast<int>(sizeof(ReverseStatesPointers<T>));
  static_assert(kPointers % 8 == 0 && kBytes <= S::kMaxBytes);
};

template <class T, int W>
struct ReverseStatesBlock {
  using L = ReverseStatesLayout<T, W>;
  static constexpr int kRowTiles = L::kRowTiles, kThreads = L::kThreads;

  const ReverseStatesParams<T>& p;
  unsigned char* shared;
  int first_feature, each;  // of the block; query heads of a key/value head

  // The reverse state of a thread's features, relative to exp(log_mass). mass: this lane's share.
  struct State {
    float sum[kRowTiles][W / 8][4] = {}, mass[kRowTiles][2] = {};
    float log_mass[kRowTiles][2];
  };

  PERFORMER_DEVICE T* tile(int offset) const { return reinterpret_cast<T*>(shared + offset); }
  PERFORMER_DEVICE float* floats(int offset) const {
    return reinterpret_cast<float*>(shared + offset);
  }
  PERFORMER_DEVICE ReverseStatesPointers<T>* pointers() const {
    return reinterpret_cast<ReverseStatesPointers<T>*>(shared + L::kPointers);
  }
  // Of a thread's features, row (m, e), in the block.
  PERFORMER_DEVICE static int Feature(int m, int e, int tid) {
    return (tid / 32 * kRowTiles + m) * 16 + tid % 32 / 4 + 8 * e;
  }

  // By one thread.
  PERFORMER_DEVICE void StorePointers(int64_t split, int64_t group) const {
    const WorkTile work = GetWorkTile(p.work, split);
    const int64_t heads = p.query.heads, features = p.features, head = group * each;
    const int64_t row0 = work.first_row + work.begin;
    const int64_t tile = FirstWorkTile(p.tiles, work.sequence) + work.begin / kTile;
    const int64_t before =
        (p.before_each ? split : (p.before_count == 1 ? 0 : work.sequence)) * p.groups + group;
    const int64_t checkpoint =
        FirstWorkTile(p.checkpoint_tiles, work.sequence) + work.begin / p.checkpoint_tiles.unit;
    const int64_t at = checkpoint * p.groups + group, pad = p.features_pad;
    *pointers() = {p.query.Row(row0, head),
                   p.grad_out.Row(row0, head),
                   StatisticsFrom<T>(p.statistics, row0 * heads + head),
                   p.before_log_mass + before * features + first_feature,
                   (work.last() ? p.log_mass + (work.sequence * p.groups + group) * features
                                : p.before_log_mass + ((split + 1) * p.groups + group) * features) +
                       first_feature,
                   p.tile_log_mass + (tile * p.groups + group) * pad + first_feature,
                   p.checkpoints.sum + (at * pad + first_feature) * W,
                   p.checkpoints.numbers + at * kReverseNumbers * pad + first_feature,
                   OriginOfTile<T, W>(p.origin, split, p.groups, group, true),
                   OriginOfTile<T, W>(p.origin, split, p.groups, group, false),
                   static_cast<int>(work.end - work.begin),
                   static_cast<int>(features) - first_feature,
                   static_cast<int>(pad) - first_feature};
  }

  PERFORMER_DEVICE const T* HeadProjection(int64_t head, int64_t group) const {
    return p.projection.At(QueryHeadIndex(p.projection.heads, head, p.query.heads, group),
                           p.features_pad, W) +
           static_cast<int64_t>(first_feature) * W;
  }

  // Starts copying the queries of a tile, and grad_out, of query head `head` of the group.
  PERFORMER_DEVICE void Issue(int number, int head, int buffer, int tid) const {
    const ReverseStatesPointers<T>& from = *pointers();
    const int first = number * kTile;
    const auto valid = [&](int r) { return first + r < from.rows; };
    CopyRows<T, W, kTile, kThreads>(tile(L::kQuery) + buffer * kTile * W,
                                    from.query + head * p.query.width, first, p.query, tid, valid);
    CopyRows<T, W, kTile, kThreads>(tile(L::kGradOut) + buffer * kTile * W,
                                    from.grad_out + head * p.grad_out.width, first, p.grad_out, tid,
                                    valid);
    CpAsyncCommit();
    if (tid < kTile)
      LoadStatistics<T>(floats(L::kRowMax), floats(L::kLogSum), floats(L::kDelta),
                        buffer * kTile + tid, from.statistics,
                        static_cast<int64_t>(first + tid) * p.query.heads + head, valid(tid));
  }

  // The empty reverse state after the split's last row.
  PERFORMER_DEVICE void Init(State& state, int tid) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int feature = Feature(m, e, tid);
        const float log_mass =
            feature < pointers()->features ? pointers()->after[feature] : -kInfinity;
        state.log_mass[m][e] = log_mass * p.map.inverse_root;
      }
  }

  // Before the first tile: r becomes that of values that are less the first origin.
  PERFORMER_DEVICE void MoveOrigin(State& state, int tid) const {
    const int t = Opaque(tid) % 4;
#pragma unroll
    for (int n = 0; n < W / 8; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = n * 8 + 2 * t + c;
        const float moved = pointers()->origin[column] - pointers()->first_origin[column];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int e = 0; e < 2; ++e) state.mass[m][e] += state.sum[m][n][2 * e + c] * moved;
      }
  }

  // Stores the reverse state as a checkpoint of the split.
  PERFORMER_DEVICE void StoreCheckpoint(const State& state, int number, int tid) const {
    tid = Opaque(tid);
    const ReverseStatesPointers<T>& to = *pointers();
    const int64_t pad = p.features_pad, at = number * p.groups;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float mass = QuadSum(state.mass[m][e]);
        HalfScale scale = {1.f, 1.f};
        if constexpr (kIs16Bit<T>) {
          float largest = 0;
#pragma unroll
          for (int n = 0; n < W / 8; ++n)
            largest = fmaxf(
                largest, fmaxf(fabsf(state.sum[m][n][2 * e]), fabsf(state.sum[m][n][2 * e + 1])));
          scale = ScaleOfHalf(QuadMax(largest));
        }
        const int feature = Feature(m, e, tid), t = tid % 4;
        if (feature >= to.padded) continue;
        if (t == 0) {
          float* const numbers = to.numbers + at * kReverseNumbers * pad + feature;
          numbers[0] = mass;
          numbers[pad] = state.log_mass[m][e] == -kInfinity ? kInfinity : state.log_mass[m][e];
          numbers[2 * pad] = scale.from_half;
        }
        ReverseNumber<T>* const row = to.sum + (at * pad + feature) * W + 2 * t;
#pragma unroll
        for (int n = 0; n < W / 8; ++n)
          StorePair(row + n * 8, scale.to_half * state.sum[m][n][2 * e],
                    scale.to_half * state.sum[m][n][2 * e + 1]);
      }
  }

  // The reverse state becomes relative to log_mass before another tile.
  PERFORMER_DEVICE void Rescale(State& state, const float (&before)[kRowTiles][2],
                                const float (&of_tile)[kRowTiles][2]) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float log_mass = MergedLogMass(p.map, before[m][e], of_tile[m][e]);
        const float keep =
            log_mass == -kInfinity ? 0.f : Exp2((log_mass - state.log_mass[m][e]) * p.map.unit());
        state.log_mass[m][e] = log_mass;
        state.mass[m][e] *= keep;
#pragma unroll
        for (int n = 0; n < W / 8; ++n)
          state.sum[m][n][2 * e] *= keep, state.sum[m][n][2 * e + 1] *= keep;
      }
  }

  // Adds 32 queries of a tile, from j0 on. row_bias: log_mass and feature_bias.
  PERFORMER_DEVICE void AddQueries(State& state, const float (&row_bias)[kRowTiles][2], int buffer,
                                   int j0, int tid) const {
    const int lane = Opaque(tid % 32), t = lane % 4, first = buffer * kTile + j0;
    const bool linear = p.map.linear();
    const float unit = p.map.unit();
    const float *const row_max = floats(L::kRowMax), *const log_sum = floats(L::kLogSum);
    const float* const delta = floats(L::kDelta);
    BackwardTile<kRowTiles> x;
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
          x[m][n][i] = kIs16Bit<T> && linear ? -row_max[first + n * 8 + 2 * t + (i & 1)] : 0.f;
    FeatureProduct<T, W, kRowTiles>(x, tile(0), tid / 32 * 16 * kRowTiles,
                                    tile(L::kQuery) + buffer * kTile * W, j0, lane);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = first + n * 8 + 2 * t + (i & 1);
          float& y = x[m][n][i];
          if (!linear) y = MappedLogit(p.map, y);
          if constexpr (kIs16Bit<T>) {
            if (!linear) y -= row_max[j];
            y += row_bias[m][i / 2];
          } else {  // two large numbers first
            y += row_bias[m][i / 2] - row_max[j];
          }
          y = RowWeight<T>(y, log_sum, j, unit);
          // As the operand is rounded: its errors cancel in R . v - r.
          if constexpr (kIs16Bit<T>) y = ToFloat(FromFloat<T>(y));
          state.mass[m][i / 2] += y * delta[j];
        }
    SumTokens<T, W, kRowTiles>(state.sum, x, tile(L::kGradOut) + buffer * kTile * W, j0, 0, lane);
  }
};

// Grid: (splits of all sequences times feature blocks, key/value heads).
template <class T, int W>
__global__ void __launch_bounds__(128, 1) ReverseStatesKernel(ReverseStatesParams<T> p) {
  using Block = ReverseStatesBlock<T, W>;
  using L = typename Block::L;
  constexpr int kRowTiles = L::kRowTiles, kThreads = L::kThreads;
  PERFORMER_SHARED_MEMORY(shared);
  const int tid = threadIdx.x;
  const int64_t split = blockIdx.x / p.feature_blocks, group = blockIdx.y;
  const Block block = {p, shared, static_cast<int>(blockIdx.x % p.feature_blocks) * L::kFeatures,
                       static_cast<int>(p.query.heads / p.groups)};
  const int each = block.each;
  const bool by_head = p.projection.heads > p.groups && each > 1;
  if (tid == 0) block.StorePointers(split, group);
  __syncthreads();  // the pointers are visible
  const auto copy_projection = [&](int head) {
    CopyOperand<T, W, L::kFeatures, kThreads>(block.tile(0),
                                              block.HeadProjection(group * each + head, group),
                                              block.pointers()->padded, tid);
    CpAsyncCommit();
  };
  const int tiles = static_cast<int>(CeilDiv(block.pointers()->rows, kTile)), steps = tiles * each;
  copy_projection(0);
  block.Issue(tiles - 1, 0, 0, tid);
  typename Block::State state;
  block.Init(state, tid);

#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int number = tiles - 1 - step / each, head = step % each, buffer = step & 1;
    // Of the tiles between two checkpoints: the first one, and whether this is the last one.
    constexpr int kTiles = kCheckpointTiles<T, W>;
    const int first = number / kTiles * kTiles;
    const bool enters = head == 0 && (number - first == kTiles - 1 || number == tiles - 1);
    float before[kRowTiles][2], of_tile[kRowTiles][2], row_bias[kRowTiles][2];
    {
      const ReverseStatesPointers<T>& from = *block.pointers();
      const float* feature_bias =
          p.feature_bias +
          QueryHeadIndex(p.feature_bias_heads, group * each + head, p.query.heads, group) *
              p.features +
          block.first_feature;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int feature = Block::Feature(m, e, tid);
          const bool given = feature < from.features;
          before[m][e] = given ? from.before[feature] * p.map.inverse_root : -kInfinity;
          of_tile[m][e] = given && first > 0
                              ? from.tile_log_mass[first * p.groups * p.features_pad + feature]
                              : -kInfinity;
          row_bias[m][e] = given ? feature_bias[feature] * p.map.inverse_root : 0.f;
        }
    }
    CpAsyncWait<0>();
    __syncthreads();  // the tile is complete, and nobody reads the other buffer any more
    if (by_head && step > 0) {
      copy_projection(head);
      CpAsyncWait<0>();
      __syncthreads();  // the head's projection is complete
    }
    if (step + 1 < steps)
      block.Issue(tiles - 1 - (step + 1) / each, (step + 1) % each, buffer ^ 1, tid);
    if (enters) {
      if constexpr (!kIs16Bit<T>)
        if (number == 0) block.MoveOrigin(state, tid);
      block.StoreCheckpoint(state, number / kTiles, tid);
      block.Rescale(state, before, of_tile);
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) row_bias[m][e] += state.log_mass[m][e];
#pragma unroll 1
    for (int j0 = 0; j0 < kTile; j0 += 32) block.AddQueries(state, row_bias, buffer, j0, tid);
  }

  const int64_t part = split * p.groups + group;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int feature = block.first_feature + Block::Feature(m, e, tid);
      const float total = QuadSum(state.mass[m][e]);
      if (tid % 4 == 0 && feature < p.features) p.part_mass[part * p.features + feature] = total;
    }
  StoreSums(p.part_mean + part * p.features * p.grad_out.width, p.grad_out.width,
            static_cast<int>(p.features), block.first_feature + tid / 32 * 16 * kRowTiles,
            state.sum, 1.f, 0, tid % 32);
}

// The reverse state after each split, relative to the state there, with zeros in the padding.
struct StatesAfterSplits {
  void* sum = nullptr;  // R [splits, G, M_pad, W] in ReverseNumber<T>, less a factor in 16 bits
  // [splits, G, kAfterNumbers, M_pad]: r; r with the origin of the split's first tile; log_mass
  // after the split and before it, in units of root, or -inf; the factor of R.
  float* numbers = nullptr;
};
inline constexpr int kAfterNumbers = 5;

struct MergeReverseStatesParams {
  WorkTiles splits;
  int64_t groups = 0, features = 0, features_pad = 0;
  int width = 0;
  float inverse_root = 1;                                      // see Map
  const float* part_mean = nullptr;                            // [splits, G, M, E]
  const float* part_mass = nullptr;                            // [splits, G, M]
  const float* before_log_mass = nullptr;                      // [splits, G, M] if before_each
  bool before_each = false;                                    // see CausalRowsParams
  const float *log_mass = nullptr, *mean = nullptr;            // final state [N, G, M(, E)]
  const float *grad_log_mass = nullptr, *grad_mean = nullptr;  // its gradient, or nullptr
  // The initial state [initial_count, G, M(, E)], and its gradient [N, G, M(, E)], or nullptr where
  // that is not asked for.
  const float *initial_log_mass = nullptr, *initial_mean = nullptr;
  int64_t initial_count = 0;  // 0: none, 1 or N
  float *grad_initial_log_mass = nullptr, *grad_initial_mean = nullptr;
  const float* origin = nullptr;  // see CausalGradientParams
  int padded_width = 0;           // W
  StatesAfterSplits after;
};

// One warp for each sequence, key/value head and feature, up to features_pad.
template <class N>
__global__ void __launch_bounds__(256, 4) MergeReverseStatesKernel(MergeReverseStatesParams p) {
  constexpr int kColumns = 8;  // of a lane: E <= 256
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int64_t padded = p.groups * p.features_pad, per_sequence = p.groups * p.features;
  if (index >= p.splits.sequences * padded) return;
  const int lane = threadIdx.x % 32;
  const int64_t sequence = index / padded, group = index % padded / p.features_pad;
  const int64_t feature_of_group = index % p.features_pad;
  const int64_t feature = group * p.features + feature_of_group;  // of all heads
  const int64_t number = sequence * per_sequence + feature;
  const int64_t first = FirstWorkTile(p.splits, sequence),
                count = WorkTileCount(p.splits, sequence);
  const int64_t initial = (p.initial_count == 1 ? 0 : sequence) * per_sequence + feature;

  float sum[kColumns] = {};
  // Stores the reverse state after a split.
  const auto store = [&](int64_t split, float mass, float of_first, float after, float before) {
    HalfScale scale = {1.f, 1.f};
    if constexpr (kIs16Bit<N>) scale = ScaleOfHalf(WarpMax(Largest(sum)));
    const int64_t at = split * p.groups + group, pad = p.features_pad;
    if (lane == 0) {
      const float numbers[kAfterNumbers] = {mass, of_first, after * p.inverse_root,
                                            before * p.inverse_root, scale.from_half};
#pragma unroll
      for (int i = 0; i < kAfterNumbers; ++i)
        p.after.numbers[(at * kAfterNumbers + i) * pad + feature_of_group] = numbers[i];
    }
    N* const to =
        static_cast<N*>(p.after.sum) + (at * pad + feature_of_group) * p.padded_width + lane;
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      if (lane + 32 * i < p.padded_width) to[32 * i] = FromFloat<N>(scale.to_half * sum[i]);
  };
  if (feature_of_group >= p.features) {
    for (int64_t split = first; split < first + count; ++split)
      store(split, 0.f, 0.f, -kInfinity, -kInfinity);
    return;
  }

  // What values are less in the first tile of a split, and in its others.
  const auto origin = [&](int64_t split, bool other, int column) {
    return p.origin == nullptr
               ? 0.f
               : p.origin[((split * 2 + other) * p.groups + group) * p.padded_width + column];
  };
  float log_mass = p.log_mass[number], mass = 0;
  if (log_mass != -kInfinity && p.grad_log_mass != nullptr) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = lane + 32 * i;
      if (column >= p.width) continue;
      sum[i] = p.grad_mean[number * p.width + column];
      const float less = count > 0 ? origin(first + count - 1, true, column) : 0.f;
      mass += sum[i] * (p.mean[number * p.width + column] - less);
    }
    mass = WarpSum(mass);
    mass -= p.grad_log_mass[number];
  }
  // What r gains where values become less `to` instead of `from`.
  const auto moved = [&](int64_t from, bool from_other, int64_t to, bool to_other) {
    if (p.origin == nullptr) return 0.f;
    float more = 0;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = lane + 32 * i;
      if (column < p.width)
        more += sum[i] * (origin(from, from_other, column) - origin(to, to_other, column));
    }
    return WarpSum(more);
  };
  for (int64_t split = first + count - 1; split >= first; --split) {
    const int64_t row = split * per_sequence + feature;
    const float of_first = mass + moved(split, true, split, false);
    const float before = p.before_each         ? p.before_log_mass[row]
                         : p.initial_count > 0 ? p.initial_log_mass[initial]
                                               : -kInfinity;
    store(split, mass, of_first, log_mass, before);
    const float keep = before == -kInfinity ? 0.f : expf(before - log_mass);
    log_mass = before;
    mass = (keep == 0.f ? 0.f : of_first * keep) + p.part_mass[row];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      sum[i] = keep == 0.f ? 0.f : sum[i] * keep;
      if (lane + 32 * i < p.width) sum[i] += p.part_mean[row * p.width + lane + 32 * i];
    }
    if (split > first) mass += moved(split, false, split - 1, true);
  }
  // What is left is the gradient of the initial state.
  if (p.grad_initial_log_mass == nullptr) return;
  const bool any = log_mass != -kInfinity;
  float dot = 0;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int column = lane + 32 * i;
    if (column >= p.width) continue;
    p.grad_initial_mean[number * p.width + column] = sum[i];
    if (any)
      dot += sum[i] * (p.initial_mean[initial * p.width + column] -
                       (count > 0 ? origin(first, false, column) : 0.f));
  }
  dot = WarpSum(dot);
  const float grad = count > 0 ? dot - mass : p.grad_log_mass[number];
  if (lane == 0) p.grad_initial_log_mass[number] = any ? grad : 0.f;
}

}  // namespace cuda
}  // namespace performer
