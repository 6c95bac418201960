// How the rows of a call are divided among blocks, and the shared memory of a block. The division
// depends on the lengths only, never on the batch size, the number of heads or the GPU: results are
// the same bits for any of these.
#pragma once
#include <cstdint>

#include "core/indices.h"

namespace performer {
namespace cuda {

// Shared memory of a block at most: on sm_80, and on sm_86, sm_89 and sm_120, which have least
// ("Compute Capabilities" in the CUDA C++ Programming Guide).
inline constexpr int kMostSharedBytes = 163 * 1024, kSmallSharedBytes = 99 * 1024;
// Of a block for rows of `width`: where it has 4 warps, it does with the least, if rows are narrow.
inline constexpr int MostSharedBytes(int width, int warps) {
  return width <= 64 && warps <= 4 ? kSmallSharedBytes : kMostSharedBytes;
}

// Splits of a sequence are summed apart and merged in order. Each costs a state in memory (M E
// floats) and, in the causal forms, the work of summing its keys twice; each is a block's work.
// (The emulator's tests are built with shorter ones: they cross more of them in less time.)
#ifndef PERFORMER_SPLIT_ROWS
#define PERFORMER_SPLIT_ROWS 1024
#endif
inline constexpr int64_t kSplitUnit = PERFORMER_SPLIT_ROWS;
inline constexpr int64_t kMaxSplits = 32;

// Rows of a split in a sequence of `rows`.
PERFORMER_HOST_DEVICE inline constexpr int64_t SplitRows(int64_t rows) {
  return RowsPerSplit(rows, kSplitUnit, kMaxSplits);
}

// What a kernel's blocks run over along the rows of all sequences.
inline constexpr int64_t kSplits = 0;  // SplitRows of each sequence's length

// Items of `unit` rows (or splits) that cover the rows of each sequence, in order. Plain data: a
// kernel parameter.
struct Items {
  int64_t sequences = 0;
  int64_t rows = 0;  // of each sequence, if not packed
  int64_t unit = kSplits;
  const int64_t* offsets = nullptr;  // [N + 1] packed sequences; device memory
  const int64_t* first = nullptr;    // [N + 1] first item of each sequence; with offsets
};

// One item, as a block sees it.
struct Item {
  int64_t sequence, index;  // index: of the item in its sequence
  int64_t first_row, rows;  // of the sequence: first row in the tensor, and how many
  int64_t begin, end;       // of the item, in its sequence
  int64_t sequence_item;    // number of the sequence's first item
  PERFORMER_HOST_DEVICE bool last() const { return end == rows; }
};

PERFORMER_HOST_DEVICE inline int64_t ItemRows(const Items& items, int64_t rows) {
  return items.unit == kSplits ? SplitRows(rows) : items.unit;
}

PERFORMER_HOST_DEVICE inline Item Locate(const Items& items, int64_t number) {
  Item item;
  if (items.offsets == nullptr) {
    const int64_t unit = ItemRows(items, items.rows), each = CeilDiv(items.rows, unit);
    item.sequence = number / each;
    item.first_row = item.sequence * items.rows;
    item.rows = items.rows;
    item.sequence_item = item.sequence * each;
  } else {
    int64_t low = 0, high = items.sequences;  // the last sequence whose first item is <= number
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (items.first[middle] <= number ? low : high) = middle;
    }
    item.sequence = low;
    item.first_row = items.offsets[low];
    item.rows = items.offsets[low + 1] - items.offsets[low];
    item.sequence_item = items.first[low];
  }
  const int64_t unit = ItemRows(items, item.rows);
  item.index = number - item.sequence_item;
  item.begin = item.index * unit;
  item.end = item.begin + unit < item.rows ? item.begin + unit : item.rows;
  return item;
}

// Items of one sequence, and the number of its first one.
PERFORMER_HOST_DEVICE inline int64_t ItemsOf(const Items& items, int64_t sequence) {
  if (items.offsets != nullptr) return items.first[sequence + 1] - items.first[sequence];
  return CeilDiv(items.rows, ItemRows(items, items.rows));
}
PERFORMER_HOST_DEVICE inline int64_t FirstItem(const Items& items, int64_t sequence) {
  return items.offsets != nullptr ? items.first[sequence] : sequence * ItemsOf(items, sequence);
}

}  // namespace cuda
}  // namespace performer
