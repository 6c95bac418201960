// What the causal gradient needs of each query row besides the states, from the outputs of the
// forward pass before they are rounded:
//
//   row_max, log_sum     as in causal/layout.cuh, log_sum if kKeepsLogSum
//   delta                grad_out . out
//
// In float32 outputs are less the origin of the values of the row's tile (causal_backward/
// value_origin.cuh).
#pragma once
#include "cuda/kernels/causal_backward/common.cuh"

namespace performer {
namespace cuda {

template <class T>
struct CausalStatisticsParams {
  WorkTiles work;                                      // the splits
  const float* out = nullptr;                          // [rows, H, W], not rounded
  const float *out_max = nullptr, *out_sum = nullptr;  // [rows, H]: its row_max and log_sum
  int64_t groups = 0;
  float unit = 1;                 // Map::unit
  const float* origin = nullptr;  // see CausalGradientParams
  RowsOf<const T> grad_out;       // [rows, H, E]
  // [rows, H]; log_sum: nullptr unless kKeepsLogSum<T>
  float *row_max = nullptr, *log_sum = nullptr, *delta = nullptr;
};

// Blocks that share the rows of a split.
inline constexpr int kStatisticsBlocks = 16;

// Grid: (splits of all sequences, query heads, kStatisticsBlocks). A warp takes a row at a time.
template <class T, int W>
__global__ void __launch_bounds__(256) CausalStatisticsKernel(CausalStatisticsParams<T> p) {
  const int lane = threadIdx.x % 32, warps = static_cast<int>(blockDim.x) / 32;
  const WorkTile work = GetWorkTile(p.work, blockIdx.x);
  const int64_t head = blockIdx.y, heads = p.grad_out.heads;
  const int64_t group = head / (heads / p.groups);
  for (int64_t row = work.begin + blockIdx.z * warps + threadIdx.x / 32; row < work.end;
       row += kStatisticsBlocks * warps) {
    const int64_t number = (work.first_row + row) * heads + head;
    const T* grad_out = p.grad_out.Row(work.first_row + row, head);
    const float* origin = nullptr;
    if constexpr (!kIs16Bit<T>)
      origin = OriginOfTile<T, W>(p.origin, blockIdx.x, p.groups, group, row - work.begin >= kTile);
    float delta = 0;
#pragma unroll
    for (int i = 0; i < W / 32; ++i) {
      const int column = lane + 32 * i;
      if (column >= p.grad_out.width) continue;
      float out = p.out[number * W + column];
      if constexpr (!kIs16Bit<T>) out -= origin[column];
      delta += out * ToFloat(grad_out[column]);
    }
    delta = WarpSum(delta);
    if (lane != 0) continue;
    const float row_max = p.out_max[number];
    const bool any = row_max != -kInfinity;
    StoreStatistics<T>(row_max, any ? exp2f(p.out_sum[number]) : 0.f, p.unit, number, p.row_max,
                       p.log_sum);
    p.delta[number] = any ? delta : 0.f;
  }
}

}  // namespace cuda
}  // namespace performer
