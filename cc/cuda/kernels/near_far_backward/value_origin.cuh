// The origins of values in the gradient of near-and-far attention in float32
// (backward/value_origin.cuh): the average of the initial means over features that have seen a key
// or, where there are none, that of the values of the first block with an unmasked key. If causal,
// as no later key may change an earlier row, the queries of the blocks up to that one take values
// as they are. They read no far key.
//
// States are made of values less the origin: means as large as what values have in common would
// hide their differences in rounding errors. So values and initial means are copied.
#pragma once
#include "cuda/kernels/causal_backward/value_origin.cuh"
#include "cuda/kernels/near_far_backward/common.cuh"

namespace performer {
namespace cuda {

// Those of each sequence and key/value head; in 16 bits there are none.
struct NearFarOrigins {
  float* origin = nullptr;  // [N, G, W]
  int64_t* first_block =
      nullptr;  // [N, G]: queries of the blocks up to this one take values as given
  const float* values = nullptr;  // as given, [B S, G, E]
};

struct NearFarOriginParams {
  NearFarGeometry geometry;
  KeyParams<float> keys;
  int64_t groups = 0, features = 0;
  int width = 0, padded_width = 0;                                   // E, W
  const float *initial_log_mass = nullptr, *initial_mean = nullptr;  // [initial_count, G, M(, E)]
  int64_t initial_count = 0;                                         // 0, 1 or N
  NearFarOrigins origins;
  float *less_values = nullptr, *less_initial_mean = nullptr;  // the copies
};

// Grid: (sequences, key/value heads). One thread for each of the W columns.
static __global__ void __launch_bounds__(128) NearFarOriginKernel(NearFarOriginParams p) {
  PERFORMER_SHARED_MEMORY(shared);
  int64_t* const first_rows = reinterpret_cast<int64_t*>(shared);  // of each thread
  const int column = threadIdx.x, width = static_cast<int>(blockDim.x);
  const int64_t number = blockIdx.x, group = blockIdx.y, at = number * p.groups + group;
  float origin = 0;
  bool any = false;
  if (p.initial_count > 0 && p.width > 0) {
    const int64_t row = (p.initial_count == 1 ? 0 : number) * p.groups + group;
    const AverageMean initial(p.initial_log_mass + row * p.features,
                              p.initial_mean + row * p.features * p.width, p.features, p.width,
                              column < p.width ? column : 0);
    origin = initial.value;
    any = initial.any;
  }
  int64_t first_block = -1;
  if (!any && WorkTileCount(p.geometry.blocks, number) > 0) {
    const WorkTile work = GetWorkTile(p.geometry.blocks, FirstWorkTile(p.geometry.blocks, number));
    const NearFarSequence sequence = GetNearFarSequence(p.geometry, work);
    const KeyBias& bias = p.keys.bias;
    const float* const given =
        bias.data + group * bias.head_step +
        (p.keys.packed ? sequence.key_row * bias.step : number * bias.batch_step);
    const auto masked = [&](int64_t row) { return given[row * bias.step] == -kInfinity; };
    int64_t row = column;
    while (row < sequence.rows && masked(row)) row += width;
    first_rows[column] = row;
    __syncthreads();  // the first unmasked row of each thread is visible
    int64_t first = sequence.rows;
    for (int i = 0; i < width; ++i) first = first_rows[i] < first ? first_rows[i] : first;
    first_block = (first + p.geometry.phase) / p.geometry.window;
    int64_t end = (first_block + 1) * p.geometry.window - p.geometry.phase;
    if (end > sequence.rows) end = sequence.rows;
    float sum = 0, count = 0;
    for (int64_t j = first; j < end; ++j) {
      if (masked(j)) continue;
      count += 1;
      if (column < p.width) sum += p.keys.value.Row(sequence.key_row + j, group)[column];
    }
    if (count > 0.f) origin = FiniteOrZero(sum / count);
    if (!p.geometry.causal) first_block = -1;
  }
  p.origins.origin[at * width + column] = origin;
  if (column == 0) p.origins.first_block[at] = first_block;
}

inline constexpr int kLessOriginThreads = 256;

// Values less the origin. Grid: (blocks of positions, key/value heads).
static __global__ void __launch_bounds__(kLessOriginThreads)
    NearFarValuesKernel(NearFarOriginParams p) {
  const WorkTile work = GetWorkTile(p.geometry.blocks, blockIdx.x);
  const NearFarSequence sequence = GetNearFarSequence(p.geometry, work);
  const int64_t group = blockIdx.y, first = work.index * p.geometry.window - p.geometry.phase;
  const int64_t begin = first < 0 ? 0 : first, block_end = first + p.geometry.window;
  const int64_t end = block_end < sequence.rows ? block_end : sequence.rows;
  const float* const origin =
      p.origins.origin + (work.sequence * p.groups + group) * p.padded_width;
  const RowsOf<const float>& values = p.keys.value;
  for (int64_t i = threadIdx.x; i < (end - begin) * p.width; i += kLessOriginThreads) {
    const int64_t column = i % p.width, row = sequence.key_row + begin + i / p.width;
    const int64_t at = row * values.stride + group * p.width + column;
    p.less_values[at] = values.data[at] - origin[column];
  }
}

// Initial means less the origin; 0 where no key has been seen. Grid: (initial_count, heads).
static __global__ void __launch_bounds__(kLessOriginThreads)
    NearFarInitialMeanKernel(NearFarOriginParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.groups + blockIdx.y;
  const float* const origin = p.origins.origin + row * p.padded_width;
  for (int64_t i = threadIdx.x; i < p.features * p.width; i += kLessOriginThreads) {
    const int64_t at = row * p.features * p.width + i;
    const bool any = p.initial_log_mass[row * p.features + i / p.width] != -kInfinity;
    p.less_initial_mean[at] = any ? p.initial_mean[at] - origin[i % p.width] : 0.f;
  }
}

}  // namespace cuda
}  // namespace performer
