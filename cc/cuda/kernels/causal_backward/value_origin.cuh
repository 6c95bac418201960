// The origins of values in the causal gradient in float32 (backward/value_origin.cuh). As no later
// key may change an earlier row, they come from the past of the rows that they serve, averaged over
// features that have seen a key:
//
//   a later split                           the means before it
//   first split, after an initial state     the initial means
//   first split, its first tile             0
//   first split, its other tiles            the means of the first tile
#pragma once
#include "cuda/kernels/causal_backward/common.cuh"

namespace performer {
namespace cuda {

struct CausalOriginParams {
  WorkTiles splits, tiles;
  int64_t groups = 0, features = 0, features_pad = 0;
  // The states before splits, as in CausalRowsParams.
  const float *before_log_mass = nullptr, *before_operand = nullptr;
  bool before_each = false;
  int64_t before_count = 0;
  Checkpoints<float> checkpoints;
  float* origin = nullptr;  // [splits, 2, G, W]
};

// The average of column `column` of means [features, width], if any feature has seen a key.
struct AverageMean {
  float value = 0;
  bool any = false;

  PERFORMER_DEVICE AverageMean(const float* log_mass, const float* mean, int64_t features,
                               int width, int column) {
    float sum = 0, seen = 0;
    for (int64_t feature = 0; feature < features; ++feature) {
      if (log_mass[feature] == -kInfinity) continue;
      seen += 1;
      sum += mean[feature * width + column];
    }
    any = seen > 0.f;
    if (any) value = FiniteOrZero(sum / seen);
  }
};

// Grid: (splits of all sequences, key/value heads). One thread for each of the W columns.
static __global__ void __launch_bounds__(128) CausalOriginKernel(CausalOriginParams p) {
  const int column = threadIdx.x, width = static_cast<int>(blockDim.x);
  const WorkTile split = GetWorkTile(p.splits, blockIdx.x);
  const int64_t group = blockIdx.y;
  float first = 0, others = 0;
  bool any = false;
  if (p.before_each || p.before_count > 0) {
    const int64_t row =
        (p.before_each ? blockIdx.x : (p.before_count == 1 ? 0 : split.sequence)) * p.groups +
        group;
    const AverageMean before(p.before_log_mass + row * p.features,
                             p.before_operand + row * p.features_pad * width, p.features, width,
                             column);
    first = others = before.value;
    any = before.any;
  }
  if (!any && split.end - split.begin > kTile) {
    const int64_t tile = FirstWorkTile(p.tiles, split.sequence) + split.begin / kTile + 1;
    const int64_t row = (tile * p.groups + group) * p.features_pad;
    others = AverageMean(p.checkpoints.log_mass + row, p.checkpoints.mean + row * width, p.features,
                         width, column)
                 .value;
  }
  float* to = p.origin + (blockIdx.x * 2 * p.groups + group) * width + column;
  to[0] = first;
  to[p.groups * width] = others;
}

}  // namespace cuda
}  // namespace performer
