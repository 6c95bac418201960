// How the rows of a call are divided among blocks, and the shared memory of a block. The division
// depends on the lengths of the sequences only, never on the batch size, the number of heads or the
// GPU: results are the same bits for any of these.
#pragma once
#include <cstdint>

#include "core/splits.h"

namespace performer {
namespace cuda {

// The most shared memory of a block: on sm_80, and on the GPUs that have least, sm_86, sm_89 and
// sm_120 ("Compute Capabilities" in the CUDA C++ Programming Guide).
inline constexpr int kMaxSharedBytes = 163 * 1024, kSmallSharedBytes = 99 * 1024;
// The limit of a block that has rows of `width`: narrow rows and 4 warps must fit on every GPU.
inline constexpr int MaxSharedBytes(int width, int warps) {
  return width <= 64 && warps <= 4 ? kSmallSharedBytes : kMaxSharedBytes;
}

// Splits of a sequence are summed separately and merged in order; a split is the work of one block.
// Each costs a state in memory (M E floats) and, in the causal operators, a second pass over its
// keys. (Tests on the emulator are built with shorter splits, to cross more of them in less time.)
#ifndef PERFORMER_SPLIT_ROWS
#define PERFORMER_SPLIT_ROWS 1024
#endif
inline constexpr int64_t kSplitUnit = PERFORMER_SPLIT_ROWS;
inline constexpr int64_t kMaxSplits = 32;

// Rows of a split in a sequence of `rows`.
PERFORMER_HOST_DEVICE inline constexpr int64_t SplitRows(int64_t rows) {
  return RowsPerSplit(rows, kSplitUnit, kMaxSplits);
}

// The unit of WorkTiles whose tiles are splits: SplitRows of each sequence's length.
inline constexpr int64_t kSplits = 0;

// Work tiles of `unit` rows, or splits, that cover the rows of each sequence in order; a sequence's
// last one may be shorter. Plain data: a kernel parameter.
struct WorkTiles {
  int64_t sequences = 0;             // N
  int64_t rows = 0;                  // of each sequence, if they are not packed
  int64_t unit = kSplits;            // rows of a tile
  int64_t multiple = 1;              // of which the rows of a split are one
  const int64_t* offsets = nullptr;  // [N + 1] of packed sequences, else nullptr; device memory
  const int64_t* first = nullptr;    // [N + 1] first tile of each sequence; given with offsets
};

// One tile, as a block sees it.
struct WorkTile {
  int64_t sequence, index;  // index: of the tile in its sequence
  int64_t first_row, rows;  // of the sequence: its first row in the tensor, and its length
  int64_t begin, end;       // rows of the tile, counted in its sequence
  int64_t first_tile;       // the number of the sequence's first tile
  PERFORMER_HOST_DEVICE bool last() const { return end == rows; }
};

// Rows of a tile in a sequence of `rows`.
PERFORMER_HOST_DEVICE inline int64_t WorkTileRows(const WorkTiles& tiles, int64_t rows) {
  return tiles.unit == kSplits ? RoundUp(SplitRows(rows), tiles.multiple) : tiles.unit;
}

// The tile with this number, counted over all sequences.
PERFORMER_HOST_DEVICE inline WorkTile GetWorkTile(const WorkTiles& tiles, int64_t number) {
  WorkTile work;
  if (tiles.offsets == nullptr) {
    const int64_t per_sequence = CeilDiv(tiles.rows, WorkTileRows(tiles, tiles.rows));
    work.sequence = number / per_sequence;
    work.first_row = work.sequence * tiles.rows;
    work.rows = tiles.rows;
    work.first_tile = work.sequence * per_sequence;
  } else {
    int64_t low = 0, high = tiles.sequences;  // the last sequence whose first tile is <= number
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (tiles.first[middle] <= number ? low : high) = middle;
    }
    work.sequence = low;
    work.first_row = tiles.offsets[low];
    work.rows = tiles.offsets[low + 1] - tiles.offsets[low];
    work.first_tile = tiles.first[low];
  }
  const int64_t unit = WorkTileRows(tiles, work.rows);
  work.index = number - work.first_tile;
  work.begin = work.index * unit;
  work.end = work.begin + unit < work.rows ? work.begin + unit : work.rows;
  return work;
}

// The number of tiles of one sequence, and the number of its first one.
PERFORMER_HOST_DEVICE inline int64_t WorkTileCount(const WorkTiles& tiles, int64_t sequence) {
  if (tiles.offsets != nullptr) return tiles.first[sequence + 1] - tiles.first[sequence];
  return CeilDiv(tiles.rows, WorkTileRows(tiles, tiles.rows));
}
PERFORMER_HOST_DEVICE inline int64_t FirstWorkTile(const WorkTiles& tiles, int64_t sequence) {
  return tiles.offsets != nullptr ? tiles.first[sequence]
                                  : sequence * WorkTileCount(tiles, sequence);
}

}  // namespace cuda
}  // namespace performer
