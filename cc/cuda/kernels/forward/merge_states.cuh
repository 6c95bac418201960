// Merges the states of splits in their order: to one state for each sequence and, for causal
// attention, to the state before each split.
//
// Grid: one warp for each sequence, key/value head and feature, up to features_pad.
#pragma once
#include "cuda/device/kernel_params.cuh"

namespace performer {
namespace cuda {

struct MergeParams {
  WorkTiles splits;
  int64_t groups = 0, features = 0;
  int width = 0;
  float* part_log_mass = nullptr;  // [splits, G, M]
  float* part_mean = nullptr;      // [splits, G, M, E]
  // The state that a sequence begins with, [initial_count, G, M(, E)].
  const float* initial_log_mass = nullptr;
  const float* initial_mean = nullptr;
  int64_t initial_count = 0;  // 0: there is none, 1: the same for all sequences, or N
  // Where `before`, part_log_mass becomes that before each split, and so do the means: in place, or
  // as operands [splits, G, M_pad, operand_width], with zeros in the padding.
  bool before = false;
  void* operand = nullptr;
  int64_t features_pad = 0;  // M_pad with operands, else M
  int operand_width = 0;
  float* log_mass = nullptr;  // the results [N, G, M]
  float* mean = nullptr;      // [N, G, M, E]
};

inline constexpr int kMergeColumns = 8;  // columns of mean in a lane: E <= 256

// Merges another state into (log_mass, mean). A lane has kMergeColumns columns of the means.
PERFORMER_DEVICE void MergeState(float& log_mass, float (&mean)[kMergeColumns],
                                 float other_log_mass, const float (&other)[kMergeColumns]) {
  const float reference = ZeroIfNone(fmaxf(log_mass, other_log_mass));
  const float mass = expf(log_mass - reference), other_mass = expf(other_log_mass - reference);
  const float sum = mass + other_mass;
  if (sum == 0.f) return;  // both are empty
#pragma unroll
  for (int i = 0; i < kMergeColumns; ++i)
    mean[i] = (mass == 0.f ? 0.f : mass / sum * mean[i]) +
              (other_mass == 0.f ? 0.f : other_mass / sum * other[i]);
  log_mass = reference + logf(sum);
}

// T: of the operands.
template <class T>
__global__ void __launch_bounds__(256) MergeKernel(MergeParams p) {
  const int64_t number = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int64_t padded = p.groups * p.features_pad, per_sequence = p.groups * p.features;
  if (number >= p.splits.sequences * padded) return;
  const int lane = threadIdx.x % 32;
  const int64_t sequence = number / padded, group = number % padded / p.features_pad;
  const int64_t feature_of_group = number % p.features_pad;
  const int64_t feature = group * p.features + feature_of_group;
  const int64_t first = FirstWorkTile(p.splits, sequence),
                count = WorkTileCount(p.splits, sequence);
  const auto store_operand = [&](int64_t split, const float (&mean)[kMergeColumns]) {
    T* const to =
        static_cast<T*>(p.operand) +
        ((split * p.groups + group) * p.features_pad + feature_of_group) * p.operand_width;
#pragma unroll
    for (int i = 0; i < kMergeColumns; ++i)
      if (lane + 32 * i < p.operand_width) to[lane + 32 * i] = FromFloat<T>(mean[i]);
  };

  float log_mass = -kInfinity, mean[kMergeColumns] = {};
  if (feature_of_group >= p.features) {
    for (int64_t split = first; split < first + count; ++split) store_operand(split, mean);
    return;
  }

  const auto load = [&](const float* log_masses, const float* means, int64_t row, float& log_mass,
                        float (&mean)[kMergeColumns]) {
    log_mass = log_masses[row];
#pragma unroll
    for (int i = 0; i < kMergeColumns; ++i) {
      const int column = lane + 32 * i;
      mean[i] = column < p.width && log_mass != -kInfinity ? means[row * p.width + column] : 0.f;
    }
  };
  const auto store = [&](float* log_masses, float* means, int64_t row, float log_mass,
                         const float (&mean)[kMergeColumns]) {
    if (lane == 0) log_masses[row] = log_mass;
#pragma unroll
    for (int i = 0; i < kMergeColumns; ++i)
      if (lane + 32 * i < p.width) means[row * p.width + lane + 32 * i] = mean[i];
  };

  if (p.initial_count > 0)
    load(p.initial_log_mass, p.initial_mean,
         (p.initial_count == 1 ? 0 : sequence) * per_sequence + feature, log_mass, mean);
  for (int64_t split = first; split < first + count; ++split) {
    const int64_t row = split * per_sequence + feature;
    float part_log_mass, part[kMergeColumns];
    load(p.part_log_mass, p.part_mean, row, part_log_mass, part);
    if (p.before) {
      __syncwarp();  // lane 0 writes the log_mass that all lanes have read
      if (p.operand != nullptr) {
        if (lane == 0) p.part_log_mass[row] = log_mass;
        store_operand(split, mean);
      } else {
        store(p.part_log_mass, p.part_mean, row, log_mass, mean);
      }
    }
    MergeState(log_mass, mean, part_log_mass, part);
  }
  store(p.log_mass, p.mean, sequence * per_sequence + feature, log_mass, mean);
}

}  // namespace cuda
}  // namespace performer
