// Where the blocks of exact_window positions lie in the sequences of a call, on a GPU.
//
// A sequence begins at a position of its first block. Positions are counted from the start of that
// block, so that block b has positions b window to (b + 1) window, and key row j stands at position
// phase + j. Work tiles count positions: blocks are tiles of `window`, and splits have whole blocks.
#pragma once
#include "core/near_far.h"
#include "cuda/host/schedule.h"

namespace performer {
namespace cuda {

struct NearFarGeometry {
  WorkTiles blocks, splits;
  int64_t window = 0, phase = 0;
  int64_t queries = 0, keys = 0;  // L and S, if sequences are not packed
  bool causal = false;
};

// One sequence, as a block sees it.
struct NearFarSequence {
  int64_t rows;                // of keys
  int64_t key_row, query_row;  // the first ones in the tensors
  int64_t hidden;              // key rows before the first query
  int64_t blocks;              // how many
};

// work: one of its blocks, or splits.
PERFORMER_HOST_DEVICE inline NearFarSequence GetNearFarSequence(const NearFarGeometry& geometry,
                                                                const WorkTile& work) {
  const int64_t blocks = WorkTileCount(geometry.blocks, work.sequence);
  if (geometry.blocks.offsets != nullptr)
    return {work.rows, work.first_row, work.first_row, 0, blocks};
  return {geometry.keys, work.sequence * geometry.keys, work.sequence * geometry.queries,
          geometry.keys - geometry.queries, blocks};
}

}  // namespace cuda
}  // namespace performer
