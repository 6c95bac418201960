// The gradient of a key_bias that is common to all keys of a sequence. Such a bias, moved together
// with the initial state, moves the final state and all log_weights, and changes no output. So its
// gradient is
//
//   sum_m (dlog_mass (final) - dlog_mass (initial)) + sum_i dlog_weight
//
// and 0 if it masks all keys. The sum over m is taken from `common` [N, G, M], of which feature 0
// has that over rows i, too.
#pragma once
#include "cuda/kernels/near_far/geometry.cuh"

namespace performer {
namespace cuda {

struct NearFarCommonBiasParams {
  NearFarGeometry geometry;
  int64_t heads = 0, groups = 0, features = 0;
  bool packed = false;
  KeyBias bias;
  const float *log_mass = nullptr, *grad_log_mass = nullptr;      // final state, [N, G, M]
  const float* grad_initial_log_mass = nullptr;                   // [N, G, M]
  const float *log_weight = nullptr, *grad_log_weight = nullptr;  // [B L, H]
  float* common = nullptr;                                        // [N, G, M]
};

inline constexpr int kCommonBiasThreads = 256;

// Grid: (sequences, key/value heads).
static __global__ void __launch_bounds__(kCommonBiasThreads)
    NearFarCommonBiasKernel(NearFarCommonBiasParams p) {
  PERFORMER_SHARED_MEMORY(shared);
  float* const sums = reinterpret_cast<float*>(shared);  // [warps]
  const int tid = threadIdx.x;
  const int64_t number = blockIdx.x, group = blockIdx.y;
  const int64_t each = p.heads / p.groups, batch = p.packed ? 0 : number;
  const int64_t* const offsets = p.geometry.blocks.offsets;
  const int64_t first = offsets != nullptr ? offsets[number] : number * p.geometry.queries;
  const int64_t end = offsets != nullptr ? offsets[number + 1] : first + p.geometry.queries;
  const bool masked =
      p.bias.data[batch * p.bias.batch_step + group * p.bias.head_step] == -kInfinity;
  float sum = 0;
  for (int64_t i = tid; i < (end - first) * each; i += kCommonBiasThreads) {
    const int64_t at = (first + i / each) * p.heads + group * each + i % each;
    if (p.log_weight[at] != -kInfinity) sum += p.grad_log_weight[at];
  }
  sum = WarpSum(sum);
  if (tid % 32 == 0) sums[tid / 32] = sum;
  __syncthreads();  // the sums of warps are visible
  const int64_t at = (number * p.groups + group) * p.features;
  for (int64_t feature = tid; feature < p.features; feature += kCommonBiasThreads) {
    float x = p.log_mass[at + feature] == -kInfinity ? 0.f : p.grad_log_mass[at + feature];
    x -= p.grad_initial_log_mass[at + feature];
    if (feature == 0)
      for (int warp = 0; warp < kCommonBiasThreads / 32; ++warp) x += sums[warp];
    p.common[at + feature] = masked ? 0.f : x;
  }
}

}  // namespace cuda
}  // namespace performer
