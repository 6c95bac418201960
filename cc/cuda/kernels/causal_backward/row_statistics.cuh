// What the causal gradient needs of each query row besides the states, from the outputs of the
// forward pass before they are rounded:
//
//   lse = log sum_m exp(a + log_mass of the row)        delta = grad_out . out
//
// Grid: one warp for each row and head.
#pragma once
#include "cuda/device/kernel_params.cuh"

namespace performer {
namespace cuda {

template <class T>
struct CausalStatisticsParams {
  const float* part_out = nullptr;  // [parts][rows, H, W], see causal/merge_outputs.cuh
  const float* part_lse = nullptr;  // [parts][rows, H]
  int64_t parts = 0, rows = 0;
  RowsOf<const T> grad_out;                // [rows, H, E]
  float *lse = nullptr, *delta = nullptr;  // [rows, H]
};

template <class T, int W>
__global__ void __launch_bounds__(256) CausalStatisticsKernel(CausalStatisticsParams<T> p) {
  const int64_t number = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  const int64_t count = p.rows * p.grad_out.heads;
  if (number >= count) return;
  float row_max = -kInfinity;
  for (int64_t z = 0; z < p.parts; ++z) row_max = fmaxf(row_max, p.part_lse[z * count + number]);
  const float base = ZeroIfNone(row_max);
  const T* grad_out = p.grad_out.Row(number / p.grad_out.heads, number % p.grad_out.heads);
  float sum = 0, delta = 0;
  for (int64_t z = 0; z < p.parts; ++z) {
    const float share = expf(p.part_lse[z * count + number] - base);
    float dot = 0;
#pragma unroll
    for (int i = 0; i < W / 32; ++i) {
      const int column = lane + 32 * i;
      if (column < p.grad_out.width)
        dot += p.part_out[(z * count + number) * W + column] * ToFloat(grad_out[column]);
    }
    sum += share;
    delta += share == 0.f ? 0.f : share * dot;
  }
  delta = WarpSum(delta);
  if (lane != 0) return;
  p.lse[number] = sum == 0.f ? -kInfinity : base + logf(sum);
  p.delta[number] = sum == 0.f ? 0.f : delta / sum;
}

}  // namespace cuda
}  // namespace performer
