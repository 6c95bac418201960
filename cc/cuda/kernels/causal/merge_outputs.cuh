// Merges the outputs of several feature blocks, each normalised by itself, in their order:
//
//   share_z = exp(row_max_z - row_max) 2^log_sum_z        out = sum_z share_z out_z / sum_z share_z
//
// Grid: one warp for each row and head.
#pragma once
#include "cuda/device/kernel_params.cuh"

namespace performer {
namespace cuda {

template <class T>
struct MergeOutputsParams {
  const float* part_out = nullptr;                     // [parts][rows, H, W]
  const float *row_max = nullptr, *log_sum = nullptr;  // [parts][rows, H], see CausalParams
  float unit = 1;                                      // Map::unit
  int64_t parts = 0, rows = 0;
  RowsOf<T> out;  // [rows, H, E]
};

template <class T, int W>
__global__ void __launch_bounds__(256) MergeOutputsKernel(MergeOutputsParams<T> p) {
  const int64_t number = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  const int64_t count = p.rows * p.out.heads;
  if (number >= count) return;
  float row_max = -kInfinity;
  for (int64_t z = 0; z < p.parts; ++z) row_max = fmaxf(row_max, p.row_max[z * count + number]);
  const float base = ZeroIfNone(row_max);
  float sum = 0, out[W / 32] = {};
  for (int64_t z = 0; z < p.parts; ++z) {
    const int64_t at = z * count + number;
    const float share = exp2f((p.row_max[at] - base) * p.unit + p.log_sum[at]);
    sum += share;
#pragma unroll
    for (int i = 0; i < W / 32; ++i) out[i] += share * p.part_out[at * W + lane + 32 * i];
  }
  T* to = p.out.Row(number / p.out.heads, number % p.out.heads);
#pragma unroll
  for (int i = 0; i < W / 32; ++i)
    if (lane + 32 * i < p.out.width)
      to[lane + 32 * i] = FromFloat<T>(sum == 0.f ? 0.f : out[i] / sum);
}

}  // namespace cuda
}  // namespace performer
