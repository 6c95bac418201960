// Sums of partial results in a fixed order: a tree of kSumTerms, without atomics.
#pragma once
#include "cuda/device/kernel_params.cuh"

namespace performer {
namespace cuda {

inline constexpr int64_t kSumTerms = 32;

// to = sums over kSumTerms terms of `from`. One thread for each result.
struct SumParams {
  const float* from = nullptr;  // [outer, terms, size]
  float* to = nullptr;          // [outer, chunks of kSumTerms, size]
  int64_t outer = 0, terms = 0, size = 0;
};

static __global__ void __launch_bounds__(256) SumKernel(SumParams p) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t chunks = p.terms > kSumTerms ? CeilDiv(p.terms, kSumTerms) : 1;
  if (number >= p.outer * chunks * p.size) return;
  const int64_t i = number % p.size, chunk = number / p.size % chunks;
  const int64_t outer = number / p.size / chunks, first = chunk * kSumTerms;
  const int64_t last = first + kSumTerms < p.terms ? first + kSumTerms : p.terms;
  float sum = 0;
  for (int64_t term = first; term < last; ++term)
    sum += p.from[(outer * p.terms + term) * p.size + i];
  p.to[number] = sum;
}

// The gradient of a state: the sum of partial results over the splits of a sequence and the query
// heads of a key/value head. One thread for each result.
struct SumStateParams {
  const float* from = nullptr;  // [splits, H, size]
  float* to = nullptr;          // [N, G, size]
  WorkTiles splits;
  int64_t heads = 0, groups = 0, size = 0;
};

static __global__ void __launch_bounds__(256) SumStateKernel(SumStateParams p) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (number >= p.splits.sequences * p.groups * p.size) return;
  const int64_t i = number % p.size, group = number / p.size % p.groups;
  const int64_t sequence = number / p.size / p.groups, each = p.heads / p.groups;
  const int64_t first = FirstWorkTile(p.splits, sequence),
                count = WorkTileCount(p.splits, sequence);
  float sum = 0;
  for (int64_t split = first; split < first + count; ++split)
    for (int64_t head = group * each; head < (group + 1) * each; ++head)
      sum += p.from[(split * p.heads + head) * p.size + i];
  p.to[number] = sum;
}

}  // namespace cuda
}  // namespace performer
