// Splits: parts of a sequence that are work items of their own, summed apart and merged in order.
//
// Where a sequence is split depends on its length only, never on the batch size, the number of
// heads, the threads or the GPU: results are the same bits for any of these.
#pragma once
#include "core/indices.h"

namespace performer {

// The rows of a split in a sequence of `rows`: the smallest positive multiple of `unit` that gives
// at most `max_splits` splits.
PERFORMER_HOST_DEVICE PERFORMER_INLINE constexpr int64_t RowsPerSplit(int64_t rows, int64_t unit,
                                                                      int64_t max_splits) {
  const int64_t units = CeilDiv(rows, unit * max_splits);
  return unit * (units > 0 ? units : 1);
}

}  // namespace performer
