// Near-and-far attention: what callers and kernels both have to know of its blocks.
#pragma once
#include <cstdint>

#include "core/indices.h"

namespace performer {

// The number of blocks of a causal sequence that its final state takes in: two less than those up to
// the row that would come next. `phase` is the place of the first of `rows` rows in its block.
PERFORMER_HOST_DEVICE PERFORMER_INLINE constexpr int64_t NearFarFinalBlocks(int64_t phase,
                                                                            int64_t rows,
                                                                            int64_t window) {
  const int64_t next = (phase + rows) / window;
  return next > 1 ? next - 1 : 0;
}

}  // namespace performer
