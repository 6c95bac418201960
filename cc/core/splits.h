// How the rows of a call are cut: chunks that a kernel handles at a time, splits that are work
// items of their own.
//
// Both depend on the lengths only, never on the batch size, the number of heads or threads: results
// are the same bits for any of these.
#pragma once
#include <cstdint>

#include "core/indices.h"

namespace performer {

// Rows a kernel handles at a time: the log-features of a chunk stay in L2 (M = 256: 96 rows are 100
// KB).
inline constexpr int64_t kSummarizeChunk = 96;
inline constexpr int64_t kReadChunk = 24;
inline constexpr int64_t kGradChunk = 96;
inline constexpr int64_t kCausalChunk =
    48;  // also the width of the triangle that is computed pairwise
inline constexpr int64_t kCausalGradChunk = 48;

// Splits of a sequence are summed apart and merged in order.
// A multiple of every chunk that runs over splits; powers of two are cut into nearly equal ones.
inline constexpr int64_t kSplitUnit = 1056;
inline constexpr int64_t kMaxSplits = 16;  // bounds the memory of partial results
static_assert(kSplitUnit % kSummarizeChunk == 0 && kSplitUnit % kReadChunk == 0 &&
              kSplitUnit % kGradChunk == 0);

// Rows of a split in a sequence of `rows`.
inline constexpr int64_t SplitRows(int64_t rows) {
  return RowsPerSplit(rows, kSplitUnit, kMaxSplits);
}

}  // namespace performer
