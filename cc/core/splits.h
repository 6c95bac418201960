// How the rows of a call are cut: chunks that a kernel handles at a time, segments that are work
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

// Segments of a sequence are summed apart and merged in order.
// A multiple of every chunk that runs over segments; powers of two are cut into nearly equal ones.
inline constexpr int64_t kSegmentUnit = 1056;
inline constexpr int64_t kMaxSegments = 16;  // bounds the memory of partial results
static_assert(kSegmentUnit % kSummarizeChunk == 0 && kSegmentUnit % kReadChunk == 0 &&
              kSegmentUnit % kGradChunk == 0);

// Rows of a segment in a sequence of `rows`.
inline constexpr int64_t SegmentRows(int64_t rows) {
  return RowsPerSegment(rows, kSegmentUnit, kMaxSegments);
}

}  // namespace performer
