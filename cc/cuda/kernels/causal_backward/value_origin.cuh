// The origins of values in the causal gradient in float32 (backward/value_origin.cuh). As no later
// key may change an earlier row, they come from the past of the rows that they serve:
//
//   first tile of a sequence       the average of the initial means, 0 if there are none
//   its other tiles, first split   the same, or the average output of the first tile's rows
//   a later split                  the average output of the last tile's rows before it
#pragma once
#include "cuda/kernels/causal_backward/common.cuh"

namespace performer {
namespace cuda {

struct CausalOriginParams {
  WorkTiles work;  // the splits
  int64_t heads = 0, groups = 0, features = 0;
  int width = 0;
  const float* out = nullptr;                        // [rows, H, W], not rounded
  const float* row_max = nullptr;                    // [rows, H]: -inf where a row sees no key
  const float *log_mass = nullptr, *mean = nullptr;  // the initial state [1 or N, G, M(, E)]
  int64_t initial_count = 0;                         // 1 or N
  float* origin = nullptr;                           // [splits, 2, G, W]
};

// The average of column `column` of the outputs of rows [begin, end) of the tensor that see a key,
// over the query heads of a group.
PERFORMER_DEVICE float AverageOutput(const CausalOriginParams& p, int64_t group, int64_t begin,
                                     int64_t end, int width, int column) {
  const int64_t each = p.heads / p.groups;
  float total = 0, seen = 0;
  for (int64_t row = begin; row < end; ++row)
    for (int64_t head = group * each; head < (group + 1) * each; ++head) {
      const int64_t number = row * p.heads + head;
      if (p.row_max[number] == -kInfinity) continue;
      total += p.out[number * width + column];
      seen += 1;
    }
  return seen == 0.f ? 0.f : FiniteOrZero(total / seen);
}

// Grid: (splits of all sequences, key/value heads). One thread for each of the W columns.
template <int kRows>
static __global__ void __launch_bounds__(128) CausalOriginKernel(CausalOriginParams p) {
  const int column = threadIdx.x, width = static_cast<int>(blockDim.x);
  const WorkTile work = GetWorkTile(p.work, blockIdx.x);
  const int64_t group = blockIdx.y;
  float first = 0, rest;
  if (work.index > 0) {
    const int64_t row = work.first_row + work.begin;
    first = rest = AverageOutput(p, group, row - kRows, row, width, column);
  } else {
    const int64_t state = (p.initial_count == 1 ? 0 : work.sequence) * p.groups + group;
    float sum = 0, seen = 0;
    for (int64_t row = state * p.features; row < (state + 1) * p.features; ++row) {
      if (p.log_mass[row] == -kInfinity) continue;
      seen += 1;
      if (column < p.width) sum += p.mean[row * p.width + column];
    }
    if (seen > 0.f) {
      first = rest = FiniteOrZero(sum / seen);
    } else {
      const int64_t rows = work.end < kRows ? work.end : kRows;
      rest = AverageOutput(p, group, work.first_row, work.first_row + rows, width, column);
    }
  }
  float* to = p.origin + (blockIdx.x * 2 * p.groups + group) * width + column;
  to[0] = first;
  to[p.groups * width] = rest;
}

}  // namespace cuda
}  // namespace performer
