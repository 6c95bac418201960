// What the causal gradient needs of each query row besides the states, from the outputs of the
// forward pass before they are rounded:
//
//   row_max, log_sum     as in causal/layout.cuh, over all feature blocks
//   delta                grad_out . out
//
// In float32 outputs are less the origin of the values of the row's chunk (causal_backward/
// value_origin.cuh).
#pragma once
#include "cuda/kernels/causal_backward/common.cuh"

namespace performer {
namespace cuda {

template <class T>
struct CausalStatisticsParams {
  WorkTiles work;                                        // the splits
  const float* part_out = nullptr;                       // [parts][rows, H, W]
  const float *part_max = nullptr, *part_sum = nullptr;  // [parts][rows, H]: row_max and log_sum
  int64_t parts = 0, rows = 0, groups = 0;
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
  const int64_t head = blockIdx.y, heads = p.grad_out.heads, count = p.rows * heads;
  const int64_t group = head / (heads / p.groups);
  for (int64_t row = work.begin + blockIdx.z * warps + threadIdx.x / 32; row < work.end;
       row += kStatisticsBlocks * warps) {
    const int64_t number = (work.first_row + row) * heads + head;
    float row_max = -kInfinity;
    for (int64_t z = 0; z < p.parts; ++z) row_max = fmaxf(row_max, p.part_max[z * count + number]);
    const float base = ZeroIfNone(row_max);
    const T* grad_out = p.grad_out.Row(work.first_row + row, head);
    const float* origin = nullptr;
    if constexpr (!kIs16Bit<T>)
      origin = OriginOfChunk<T, W>(p.origin, blockIdx.x, p.groups, group,
                                   row - work.begin >= kChunkRows<T>);
    float sum = 0, delta = 0;
    for (int64_t z = 0; z < p.parts; ++z) {
      const int64_t at = z * count + number;
      const float share = exp2f((p.part_max[at] - base) * p.unit + p.part_sum[at]);
      float dot = 0;
#pragma unroll
      for (int i = 0; i < W / 32; ++i) {
        const int column = lane + 32 * i;
        if (column >= p.grad_out.width) continue;
        float out = p.part_out[at * W + column];
        if constexpr (!kIs16Bit<T>) out -= origin[column];
        dot += out * ToFloat(grad_out[column]);
      }
      sum += share;
      delta += share == 0.f ? 0.f : share * dot;
    }
    delta = WarpSum(delta);
    if (lane != 0) continue;
    StoreStatistics<T>(row_max, sum, p.unit, number, p.row_max, p.log_sum);
    p.delta[number] = sum == 0.f ? 0.f : delta / sum;
  }
}

}  // namespace cuda
}  // namespace performer
