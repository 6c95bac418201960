// How the CPU kernels cut the rows of a call: chunks, which a kernel handles at a time, and splits
// (core/splits.h).
#pragma once
#include "core/splits.h"

namespace performer {
namespace cpu {

// Rows of a chunk. Its log-features stay in L2: at M = 256, those of 96 rows take 100 KB.
inline constexpr int64_t kSummarizeChunk = 96;
inline constexpr int64_t kReadChunk = 24;
inline constexpr int64_t kGradChunk = 96;
// Also the width of the triangle that is computed pairwise.
inline constexpr int64_t kCausalChunk = 48;
inline constexpr int64_t kCausalGradChunk = 48;
// Queries of near-and-far attention, which lie in one block.
inline constexpr int64_t kNearFarChunk = 64;
// A causal call of at most so many rows may be one of very many that hand on a state. The sums of its
// own keys are then kept apart, so that rounding errors of the calls do not add up. In longer calls
// the keys weigh enough.
inline constexpr int64_t kMaxStreamRows = 4 * kCausalChunk;

// The rows of a split are a multiple of this, which is a multiple of every chunk that runs over
// splits. It is a little more than a power of two, so that sequences of such lengths are cut into
// nearly equal splits.
inline constexpr int64_t kSplitUnit = 1056;
inline constexpr int64_t kMaxSplits = 16;  // bounds the memory of partial results
static_assert(kSplitUnit % kSummarizeChunk == 0 && kSplitUnit % kReadChunk == 0 &&
              kSplitUnit % kGradChunk == 0);

// The rows of a split in a sequence of `rows`.
PERFORMER_INLINE constexpr int64_t SplitRows(int64_t rows) {
  return RowsPerSplit(rows, kSplitUnit, kMaxSplits);
}

}  // namespace cpu
}  // namespace performer
