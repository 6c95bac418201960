// Integer arithmetic of rows and heads that the kernels of the CPU and of GPUs share. Always
// inlined: files of several instruction sets include it.
#pragma once
#include <cstdint>

#include "core/inline.h"

#if defined(__CUDACC__)
#define PERFORMER_HOST_DEVICE __host__ __device__
#else
#define PERFORMER_HOST_DEVICE
#endif

namespace performer {

PERFORMER_HOST_DEVICE PERFORMER_INLINE constexpr int64_t CeilDiv(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit;
}
PERFORMER_HOST_DEVICE PERFORMER_INLINE constexpr int64_t RoundUp(int64_t n, int64_t unit) {
  return CeilDiv(n, unit) * unit;
}

// The index of query head `head` of `heads` in a tensor with `count` heads, which is 1, G or H.
// `group` is the key/value head of that query head.
PERFORMER_HOST_DEVICE PERFORMER_INLINE constexpr int64_t QueryHeadIndex(int64_t count, int64_t head,
                                                                        int64_t heads,
                                                                        int64_t group) {
  return count == 1 ? 0 : count == heads ? head : group;
}

}  // namespace performer
