// The states of far keys, first part: each split summarized by itself, block by block, with a
// checkpoint before each of its blocks but the first. In the other direction the splits and their
// blocks come from the last one to the first, so that a checkpoint has the keys after a block.
//
// Grid: as SummarizeKernel (forward/summarize.cuh). Splits are numbered in the direction of the walk.
#pragma once
#include "cuda/kernels/causal/split_states.cuh"
#include "cuda/kernels/near_far/geometry.cuh"

namespace performer {
namespace cuda {

template <class T>
struct BlockStatesParams : SummarizeParams<T> {
  NearFarGeometry geometry;
  bool backward = false;       // the direction; never if causal
  Checkpoints<T> checkpoints;  // of all blocks, in the order of their rows
};

// What a block walks: tiles of up to kTile rows, of one block of keys each. In shared memory.
struct BlockWalk {
  int tiles_of_block;
  int blocks;      // that are summarized
  int all_blocks;  // of the split; some may only have a checkpoint
  int shift;       // the row at which the lowest block begins, counted from the pointers: at most 0
};

// A KeyStream (device/row_pipeline.cuh) of the tiles of such a walk.
template <class T, int W, int kThreads>
struct BlockKeyStream : KeyStream<T, W, kThreads> {
  using Base = KeyStream<T, W, kThreads>;
  using Base::key_bias, Base::next, Base::p, Base::pointers;

  const BlockWalk& walk;
  const int window;
  const bool backward;

  // work: the rows that are walked.
  PERFORMER_DEVICE BlockKeyStream(const BlockStatesParams<T>& p, const WorkTile& work, int64_t head,
                                  const BlockWalk& walk, unsigned char* shared, int tid)
      : Base(p.keys, p.map, work, head, shared, tid),
        walk(walk),
        window(static_cast<int>(p.geometry.window)),
        backward(p.backward) {}

  PERFORMER_DEVICE bool exists(int tile) const { return tile < walk.blocks * walk.tiles_of_block; }
  // The rows of a tile, counted from the pointers.
  PERFORMER_DEVICE int First(int tile, int* rows) const {
    const int block = tile / walk.tiles_of_block;
    const int at = (tile - block * walk.tiles_of_block) * kTile;
    *rows = min(kTile, window - at);
    return (backward ? walk.blocks - 1 - block : block) * window + at + walk.shift;
  }

  PERFORMER_DEVICE void LoadKeyBias(int tile, int tid) {
    if (tid >= kTile) return;
    next = -kInfinity;
    if (!exists(tile)) return;
    int rows;
    const int row = First(tile, &rows) + tid;
    if (tid < rows && row >= 0 && row < pointers->rows)
      next = pointers->bias[static_cast<int64_t>(row) * p.bias.step];
  }
  PERFORMER_DEVICE void Issue(int tile, int buffer, T* keys, T* values, int tid) const {
    int rows;
    const int first = First(tile, &rows);
    const float* mask = key_bias + buffer * kTile;
    const auto given = [&](int row) { return mask[row] != -kInfinity; };
    CopyRows<T, W, kTile, kThreads>(keys, pointers->key, first, p.key, tid, given);
    CopyRows<T, W, kTile, kThreads>(values, pointers->value, first, p.value, tid, given);
    CpAsyncCommit();
  }
};

template <class T, int W>
struct BlockStatesLayout {
  static constexpr int kThreads = SummarizeTraits<T, W>::kThreads;
  static constexpr int kPointers = SummarizeTraits<T, W>::kBytes;
  static constexpr int kWalk = kPointers + static_cast<int>(sizeof(CheckpointPointers<T>));
  static constexpr int kBytes = kWalk + static_cast<int>(sizeof(BlockWalk));
  static_assert(kPointers % 8 == 0 && kBytes <= MaxSharedBytes(W, SummarizeTraits<T, W>::kWarps));
};

template <class T, int W>
__global__ void __launch_bounds__(128, 2) BlockStatesKernel(BlockStatesParams<T> p) {
  using Traits = SummarizeTraits<T, W>;
  using Layout = BlockStatesLayout<T, W>;
  PERFORMER_SHARED_MEMORY(shared);
  CheckpointPointers<T>* const to =
      reinterpret_cast<CheckpointPointers<T>*>(shared + Layout::kPointers);
  BlockWalk* const walk = reinterpret_cast<BlockWalk*>(shared + Layout::kWalk);
  const NearFarGeometry& geometry = p.geometry;
  WorkTile work = GetWorkTile(p.work, blockIdx.x);
  {
    const NearFarSequence sequence = GetNearFarSequence(geometry, work);
    const int64_t window = geometry.window, phase = geometry.phase;
    // Blocks in the direction of the walk: those of the split, and those of them that are summarized.
    const int64_t first = work.begin / window, end = CeilDiv(work.end, window);
    int64_t last = end;
    if (geometry.causal) {
      const int64_t summarized = NearFarFinalBlocks(phase, sequence.rows, window);
      last = summarized < first ? first : summarized < end ? summarized : end;
    }
    const int64_t lowest = p.backward ? sequence.blocks - last : first;
    const int64_t begins = lowest * window - phase, stops = begins + (last - first) * window;
    work.first_row = sequence.key_row;
    work.begin = begins < 0 ? 0 : begins;
    work.end = stops < sequence.rows ? stops : sequence.rows;
    if (threadIdx.x == 0) {  // visible at the first barrier
      const int64_t slot = FirstWorkTile(geometry.blocks, work.sequence) +
                           (p.backward ? sequence.blocks - 1 - first : first);
      const int64_t first_feature = blockIdx.z * Traits::kFeatures;
      const int64_t row = (slot * p.groups + blockIdx.y) * p.features_pad + first_feature;
      *to = {p.checkpoints.mean + row * W, p.checkpoints.log_mass + row, p.groups * p.features_pad,
             static_cast<int>(p.features_pad - first_feature),
             static_cast<int>(p.features - first_feature)};
      *walk = {static_cast<int>(CeilDiv(window, kTile)), static_cast<int>(last - first),
               static_cast<int>(end - first), static_cast<int>(begins - work.begin)};
    }
  }
  BlockKeyStream<T, W, Traits::kThreads> stream(p, work, blockIdx.y, *walk,
                                                shared + Traits::kStream, threadIdx.x);
  SummarizeRows<T, W>(p, stream, [&](const auto& state, int tile) {
    const int blocks = (tile + 1) / walk->tiles_of_block;  // that are complete
    if (blocks * walk->tiles_of_block == tile + 1 && blocks < walk->all_blocks)
      StoreCheckpoint<T, W>(state, *to, p.map, p.backward ? -blocks : blocks, threadIdx.x);
  });
  CpAsyncWait<0>();  // for a tile that began to be copied where there is none
}

}  // namespace cuda
}  // namespace performer
