// Numbers of the host, written to the device's memory by a kernel that has them as its parameter: a
// launch keeps its parameters, so that nothing of the host is read later, and a captured graph
// holds all that it needs.
#pragma once
#include "cuda/device/ptx.h"

namespace performer {
namespace cuda {

struct StoreNumbersParams {
  static constexpr int kMaxCount = 480;  // parameters have 4096 bytes
  int64_t* to = nullptr;
  int count = 0;
  int64_t numbers[kMaxCount];
};
static_assert(sizeof(StoreNumbersParams) <= 4096);

// Grid: one block with a thread for each number.
static __global__ void __launch_bounds__(StoreNumbersParams::kMaxCount)
    StoreNumbersKernel(StoreNumbersParams p) {
  const int i = threadIdx.x;
  if (i < p.count) p.to[i] = p.numbers[i];
}

}  // namespace cuda
}  // namespace performer
