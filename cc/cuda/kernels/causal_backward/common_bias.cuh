// The gradient of a key_bias that is common to all keys of a sequence. Such a bias, moved together
// with the initial state, moves the final state and changes no output. So its gradient, summed over
// features, is
//
//   dlog_mass (final) - dlog_mass (initial)
//
// and 0 if it masks all keys. One thread for each feature.
#pragma once
#include "cuda/device/kernel_params.cuh"

namespace performer {
namespace cuda {

struct CommonBiasParams {
  int64_t sequences = 0, groups = 0, features = 0;
  bool packed = false;
  KeyBias bias;
  const float *log_mass = nullptr, *grad_log_mass = nullptr;  // final state, [N, G, M]
  const float* grad_initial_log_mass = nullptr;               // [N, G, M]
  float* common = nullptr;                                    // [N, G, M]
};

static __global__ void __launch_bounds__(256) CommonBiasKernel(CommonBiasParams p) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (number >= p.sequences * p.groups * p.features) return;
  const int64_t group = number / p.features % p.groups;
  const int64_t batch = p.packed ? 0 : number / p.features / p.groups;
  const bool masked =
      p.bias.data[batch * p.bias.batch_step + group * p.bias.head_step] == -kInfinity;
  const float last = p.log_mass[number] == -kInfinity ? 0.f : p.grad_log_mass[number];
  p.common[number] = masked ? 0.f : last - p.grad_initial_log_mass[number];
}

}  // namespace cuda
}  // namespace performer
