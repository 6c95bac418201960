// What a driver lends a kernel that handles a whole sequence and head: memory, and threads if there
// are more of them than sequences and heads. (Kernels include no std::function: see isa.h.)
#pragma once
#include <cstdint>

#include "core/inline.h"

namespace performer {
namespace cpu {

struct Sharing {
  int64_t workspace = 0;  // bytes for scratch memory, where the kernel can do with so few
  int64_t threads = 1;    // the most that run at the same time
  // As ParallelFor of `owner`, with a context for the body.
  void (*parallel_for)(const void* owner, int64_t count, int64_t cost,
                       void (*body)(void* context, int64_t begin, int64_t end),
                       void* context) = nullptr;
  const void* owner = nullptr;
  int64_t cost_per_row = 0;  // nanoseconds

  PERFORMER_INLINE bool IsShared() const { return threads > 1; }
  // body(begin, end) for ranges that cover `count` items, of so many nanoseconds each.
  template <class Body>
  PERFORMER_INLINE void ForRanges(int64_t count, int64_t cost, Body body) const {
    if (count <= 0) return;
    parallel_for(
        owner, count, cost,
        [](void* context, int64_t begin, int64_t end) {
          (*static_cast<Body*>(context))(begin, end);
        },
        &body);
  }
};

}  // namespace cpu
}  // namespace performer
