// The reverse states of near-and-far attention: what queries ask of far keys, as those of causal
// attention (causal_backward/reverse_states.cuh), with blocks of exact_window positions in the
// place of tiles of rows. Counted in the direction of a walk, queries of block b read the state
// before block b - 1. That state has all keys of the blocks up to b - 2, or less: it is one of the
// two parts, before and behind, of what the queries read. So the weights
//
//   exp(a + log_mass of that state - lse)
//
// are at most 1, and so are those of the keys, and each direction has reverse states of its own.
//
// A split has the queries that read its states: those of the blocks after each of its blocks, and
// of block 0, which reads what block 1 does. A block walks them from the last one on. Its
// checkpoint for a block of keys is relative to the state after that block, and is stored before
// the queries that read the state before it are added.
//
// Grid: (splits of all sequences times feature blocks, key/value heads).
#pragma once
#include "cuda/kernels/causal_backward/reverse_states.cuh"
#include "cuda/kernels/near_far_backward/common.cuh"

namespace performer {
namespace cuda {

// The final state is the last one that has a reverse state: that before this block, counted in the
// direction of the walk.
PERFORMER_HOST_DEVICE inline int64_t LastReverseBlock(const NearFarGeometry& geometry,
                                                      const NearFarSequence& sequence) {
  return geometry.causal ? NearFarFinalBlocks(geometry.phase, sequence.rows, geometry.window)
                         : sequence.blocks;
}

template <class T>
struct NearFarReverseParams : ReverseStatesParams<T> {  // tiles: the blocks of positions
  NearFarGeometry geometry;
  bool backward = false;  // the direction
  float log_features = 0;
};

// What a block walks: `count` blocks of queries, from `highest` down. Blocks are counted in the
// direction of the walk. Rows of queries start at the first one of the split. In shared memory,
// after ReverseStatesPointers.
struct ReverseWalk {
  int64_t highest, first, final;  // first: block of the split; final: see LastReverseBlock
  int64_t blocks;                 // of the sequence
  int64_t shift;                  // the position in the sequence of row 0
  int count, tiles;               // of blocks; of a block
  int rows;                       // of queries, to the end of the sequence
};

template <class T, int W>
struct NearFarReverseLayout : ReverseStatesLayout<T, W> {
  using S = ReverseStatesLayout<T, W>;
  static constexpr int kWalk = S::kBytes;
  static constexpr int kBytes = kWalk + static_cast<int>(sizeof(ReverseWalk));
  static_assert(kWalk % 8 == 0 && kBytes <= S::kMaxBytes);
};

template <class T, int W>
struct NearFarReverseBlock : ReverseStatesBlock<T, W> {
  using Base = ReverseStatesBlock<T, W>;
  using L = NearFarReverseLayout<T, W>;
  using Base::shared, Base::first_feature, Base::each, Base::tile, Base::floats, Base::pointers;
  static constexpr int kThreads = Base::kThreads;

  const NearFarReverseParams<T>& p;

  PERFORMER_DEVICE NearFarReverseBlock(const NearFarReverseParams<T>& p, unsigned char* shared,
                                       int first_feature)
      : Base{p, shared, first_feature, static_cast<int>(p.query.heads / p.groups)}, p(p) {}

  PERFORMER_DEVICE ReverseWalk& walk() const {
    return *reinterpret_cast<ReverseWalk*>(shared + L::kWalk);
  }
  // The block, in the order of rows, of one in the direction of the walk.
  PERFORMER_DEVICE int64_t Actual(int64_t block) const {
    return p.backward ? walk().blocks - 1 - block : block;
  }

  // By one thread.
  PERFORMER_DEVICE void StorePointers(int64_t split, int64_t group) const {
    const NearFarGeometry& geometry = p.geometry;
    const WorkTile work = GetWorkTile(p.work, split);
    const NearFarSequence sequence = GetNearFarSequence(geometry, work);
    const int64_t window = geometry.window, features = p.features, pad = p.features_pad;
    const int64_t heads = p.query.heads, head = group * each;
    const int64_t first = work.begin / window, end = CeilDiv(work.end, window);
    const int64_t final = LastReverseBlock(geometry, sequence);
    const int64_t last = end - 1 < final ? end - 1 : final;
    const int64_t lowest = first == 0 ? 0 : first + 1;
    const int64_t highest = last < first ? lowest - 1 : last + 1;
    ReverseWalk& to = walk();
    to.highest = highest;
    to.first = first;
    to.final = final;
    to.blocks = sequence.blocks;
    to.count = static_cast<int>(highest - lowest + 1);
    to.tiles = static_cast<int>(CeilDiv(window, kTile));
    // The first query, in key rows of the sequence: there is none in a block after the last one.
    const int64_t farthest = highest < sequence.blocks ? highest : sequence.blocks - 1;
    int64_t row = Actual(p.backward ? farthest : lowest) * window - geometry.phase;
    if (row < sequence.hidden) row = sequence.hidden;
    if (row > sequence.rows) row = sequence.rows;
    to.shift = row + geometry.phase;
    const int64_t rows = sequence.rows - row;
    to.rows = static_cast<int>(rows < INT32_MAX ? rows : INT32_MAX);
    const int64_t query = sequence.query_row + row - sequence.hidden;
    const int64_t before =
        (p.before_each ? split : (p.before_count == 1 ? 0 : work.sequence)) * p.groups + group;
    // Checkpoints are numbered in the order of rows: that of the split's first block.
    const int64_t slot = FirstWorkTile(p.tiles, work.sequence) + Actual(first);
    const int64_t at = slot * p.groups + group;
    *pointers() = {p.query.Row(query, head),
                   p.grad_out.Row(query, head),
                   StatisticsFrom<T>(p.statistics, query * heads + head),
                   p.before_each || p.before_count > 0
                       ? p.before_log_mass + before * features + first_feature
                       : nullptr,
                   (work.last() || !p.before_each
                        ? p.log_mass + (work.sequence * p.groups + group) * features
                        : p.before_log_mass + ((split + 1) * p.groups + group) * features) +
                       first_feature,
                   p.tile_log_mass + at * pad + first_feature,
                   p.checkpoints.sum + (at * pad + first_feature) * W,
                   p.checkpoints.numbers + at * kReverseNumbers * pad + first_feature,
                   nullptr,
                   nullptr,
                   0,
                   static_cast<int>(features) - first_feature,
                   static_cast<int>(pad) - first_feature};
  }

  // The tile of a step: rows first + begin .. first + end. head: of the group.
  struct Tile {
    int64_t block;
    int head, number;  // of the tile in its block
    int first, begin, end;
  };
  PERFORMER_DEVICE int steps() const { return walk().count * each * walk().tiles; }
  PERFORMER_DEVICE Tile TileOf(int step) const {
    const ReverseWalk& w = walk();
    Tile to = {};
    to.number = step % w.tiles;
    step /= w.tiles;
    to.head = step % each;
    to.block = w.highest - step / each;
    if (to.block >= w.blocks) return to;
    const int window = static_cast<int>(p.geometry.window);
    const int first_of_block = static_cast<int>(Actual(to.block) * window - w.shift);
    to.first = first_of_block + to.number * kTile;
    to.begin = max(0, -to.first);
    to.end = min(kTile, min(first_of_block + window, w.rows) - to.first);
    return to;
  }

  // Starts copying the queries of a tile, and grad_out.
  PERFORMER_DEVICE void Issue(const Tile& of, int buffer, int tid) const {
    const ReverseStatesPointers<T>& from = *pointers();
    const int first = of.first;
    const auto valid = [&](int r) { return r >= of.begin && r < of.end; };
    CopyRows<T, W, kTile, kThreads>(tile(L::kQuery) + buffer * kTile * W,
                                    from.query + of.head * p.query.width, first, p.query, tid,
                                    valid);
    CopyRows<T, W, kTile, kThreads>(tile(L::kGradOut) + buffer * kTile * W,
                                    from.grad_out + of.head * p.grad_out.width, first, p.grad_out,
                                    tid, valid);
    CpAsyncCommit();
    if (tid < kTile)
      LoadStatistics<T>(floats(L::kRowMax), floats(L::kLogSum), floats(L::kDelta),
                        buffer * kTile + tid, from.statistics,
                        static_cast<int64_t>(first + tid) * p.query.heads + of.head, valid(tid));
  }
};

template <class T, int W>
__global__ void __launch_bounds__(128, 1) NearFarReverseStatesKernel(NearFarReverseParams<T> p) {
  using Block = NearFarReverseBlock<T, W>;
  using L = NearFarReverseLayout<T, W>;
  constexpr int kRowTiles = L::kRowTiles, kThreads = L::kThreads;
  PERFORMER_SHARED_MEMORY(shared);
  const int tid = threadIdx.x;
  const int64_t split = blockIdx.x / p.feature_blocks, group = blockIdx.y;
  const Block block(p, shared, static_cast<int>(blockIdx.x % p.feature_blocks) * L::kFeatures);
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
  const int steps = block.steps();
  typename Block::State state;
  block.Init(state, tid);
  if (steps > 0) {
    copy_projection(0);
    block.Issue(block.TileOf(0), 0, tid);
  }

#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const typename Block::Tile of = block.TileOf(step);
    const int buffer = step & 1, head = of.head;
    // The state before a block is read by the queries of the next one; block 0 reads what block 1
    // does.
    const int64_t read = of.block - 1;
    const bool renews = read >= 0 && head == 0 && of.number == 0;
    CpAsyncWait<0>();
    __syncthreads();  // the tile is complete, and nobody reads the other buffer any more
    if (by_head && step > 0 && of.number == 0) {
      copy_projection(head);
      CpAsyncWait<0>();
      __syncthreads();  // the head's projection is complete
    }
    if (step + 1 < steps) block.Issue(block.TileOf(step + 1), buffer ^ 1, tid);
    float row_bias[kRowTiles][2];
    {
      const ReverseStatesPointers<T>& from = *block.pointers();
      const float* feature_bias =
          p.feature_bias +
          QueryHeadIndex(p.feature_bias_heads, group * each + head, p.query.heads, group) *
              p.features +
          block.first_feature;
      if (renews) {
        const int number = static_cast<int>(block.Actual(read) - block.Actual(block.walk().first));
        if (read < block.walk().final) block.StoreCheckpoint(state, number, tid);
        float before[kRowTiles][2], of_tile[kRowTiles][2];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int feature = Block::Feature(m, e, tid);
            const bool given = feature < from.features;
            before[m][e] = given && from.before != nullptr
                               ? from.before[feature] * p.map.inverse_root
                               : -kInfinity;
            of_tile[m][e] = given && number != 0
                                ? from.tile_log_mass[number * p.groups * p.features_pad + feature]
                                : -kInfinity;
          }
        block.Rescale(state, before, of_tile);
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int feature = Block::Feature(m, e, tid);
          row_bias[m][e] = state.log_mass[m][e] +
                           (feature < from.features
                                ? (feature_bias[feature] - p.log_features) * p.map.inverse_root
                                : 0.f);
        }
    }
#pragma unroll 1
    for (int j0 = 0; j0 < of.end; j0 += 32) block.AddQueries(state, row_bias, buffer, j0, tid);
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

}  // namespace cuda
}  // namespace performer
