// The names of CUDA C++ that kernels use, defined for the emulator.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "sim/emulator.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

#define PERFORMER_SIM_TEXT2(x) #x
#define PERFORMER_SIM_TEXT(x) PERFORMER_SIM_TEXT2(x)
#define threadIdx (::performer::sim::Here().thread)
#define blockIdx (::performer::sim::Here().block)
#define blockDim (::performer::sim::Here().block_dim)
#define gridDim (::performer::sim::Here().grid_dim)
#define __syncthreads() ::performer::sim::SyncThreads(__FILE__ ":" PERFORMER_SIM_TEXT(__LINE__))
#define __syncwarp() \
  ::performer::sim::SyncWarp(0xffffffffu, __FILE__ ":" PERFORMER_SIM_TEXT(__LINE__))

namespace performer {
namespace sim {

template <class T>
struct Shuffled {
  T in, out;
  int source;
};
template <class T>
PERFORMER_SIM_REGISTERS void ApplyShuffle(void** slots, uint32_t mask) {
  ++TheCounters().shuffles;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    auto* to = static_cast<Shuffled<T>*>(slots[lane]);
    if ((mask >> to->source & 1) == 0) Fail("a shuffle reads a lane that takes no part");
    to->out = static_cast<Shuffled<T>*>(slots[to->source])->in;
  }
}
template <class T>
T Shuffle(uint32_t mask, T value, int source, const char* name) {
  Shuffled<T> slot{value, value, source};
  Collective(mask, name, &slot, ApplyShuffle<T>);
  return slot.out;
}

struct Vote {
  int in, any, all;
};
PERFORMER_SIM_REGISTERS inline void ApplyVote(void** slots, uint32_t mask) {
  int any = 0, all = 1;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) {
      any |= static_cast<Vote*>(slots[lane])->in != 0;
      all &= static_cast<Vote*>(slots[lane])->in != 0;
    }
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) {
      static_cast<Vote*>(slots[lane])->any = any;
      static_cast<Vote*>(slots[lane])->all = all;
    }
}

}  // namespace sim
}  // namespace performer

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits) {
  using namespace performer::sim;
  return Shuffle(mask, value, static_cast<int>(Here().lane) ^ bits, "shfl.bfly");
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int lane) {
  return performer::sim::Shuffle(mask, value, lane & 31, "shfl.idx");
}
inline int __any_sync(uint32_t mask, int predicate) {
  performer::sim::Vote vote{predicate, 0, 0};
  performer::sim::Collective(mask, "vote.any", &vote, performer::sim::ApplyVote);
  return vote.any;
}
inline int __all_sync(uint32_t mask, int predicate) {
  performer::sim::Vote vote{predicate, 0, 0};
  performer::sim::Collective(mask, "vote.all", &vote, performer::sim::ApplyVote);
  return vote.all;
}

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline int atomicMin(int* at, int value) {
  int old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (value < old &&
         !__atomic_compare_exchange_n(at, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
inline int atomicAdd(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
