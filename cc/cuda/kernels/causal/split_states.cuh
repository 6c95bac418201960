// The states that causal attention begins with, first part: each split summarized by itself, with a
// checkpoint before each of its tiles of kTile rows but the first.
//
// Grid: as SummarizeKernel (forward/summarize.cuh).
#pragma once
#include "cuda/kernels/causal/layout.cuh"
#include "cuda/kernels/forward/summarize.cuh"

namespace performer {
namespace cuda {

template <class T>
struct SplitStatesParams : SummarizeParams<T> {
  WorkTiles tiles, means;  // of kTile rows; see CausalTileParams
  Checkpoints<T> checkpoints;
};

// After the shared memory of SummarizeTraits: where a block stores its checkpoints, from its first
// feature on. It is kept there because registers are short.
template <class T>
struct CheckpointPointers {
  T* mean;                // of the split's first tile
  float* log_mass;        // likewise
  int64_t rows_of_tile;   // features_pad of all heads
  int features, given;    // of the block: up to features_pad, up to features
  int tiles_of_mean = 1;  // means are those before each tile that is a multiple of it
};

template <class T, int W>
struct SplitStatesLayout {
  static constexpr int kThreads = SummarizeTraits<T, W>::kThreads;
  static constexpr int kPointers = SummarizeTraits<T, W>::kBytes;
  static constexpr int kBytes = kPointers + static_cast<int>(sizeof(CheckpointPointers<T>));
  static_assert(kPointers % 8 == 0 && kBytes <= MaxSharedBytes(W, SummarizeTraits<T, W>::kWarps));
};

// Stores the state so far as the checkpoint before a tile.
template <class T, int W, int kRowTiles>
PERFORMER_DEVICE void StoreCheckpoint(const Softmax<T, W, kRowTiles>& state,
                                      const CheckpointPointers<T>& to, const Map& map, int tile,
                                      int tid) {
  tid = Opaque(tid);
  const int lane = tid % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      // No division, which would take registers. An error of log_sum cancels in exp(log_mass) mean.
      const float log_sum = Log2(QuadSum(state.sum[m][e])), inverse = Exp2(-log_sum);
      const bool any = log_sum != -kInfinity;
      const int feature = (tid / 32 * kRowTiles + m) * 16 + g + 8 * e;
      if (feature >= to.features) continue;
      const int64_t row = tile * to.rows_of_tile + feature;
      if (t == 0)
        to.log_mass[row] = any && feature < to.given
                               ? state.row_max[m][e] + log_sum * (kLn2 * map.inverse_root)
                               : -kInfinity;
      if (tile % to.tiles_of_mean != 0) continue;
      T* const mean = to.mean + (tile / to.tiles_of_mean * to.rows_of_tile + feature) * W + 2 * t;
#pragma unroll
      for (int n = 0; n < W / 8; ++n)
        StorePair(mean + n * 8, any ? state.acc[m][n][2 * e] * inverse : 0.f,
                  any ? state.acc[m][n][2 * e + 1] * inverse : 0.f);
    }
}

template <class T, int W>
__global__ void __launch_bounds__(128, 2) SplitStatesKernel(SplitStatesParams<T> p) {
  PERFORMER_SHARED_MEMORY(shared);
  CheckpointPointers<T>* const to =
      reinterpret_cast<CheckpointPointers<T>*>(shared + SplitStatesLayout<T, W>::kPointers);
  if (threadIdx.x == 0) {  // visible at the first barrier
    const WorkTile split = GetWorkTile(p.work, blockIdx.x);
    const int64_t tile = FirstWorkTile(p.tiles, split.sequence) + split.begin / kTile;
    const int64_t first_feature = blockIdx.z * SummarizeTraits<T, W>::kFeatures;
    const int64_t mean = FirstWorkTile(p.means, split.sequence) + split.begin / p.means.unit;
    const auto row = [&](int64_t number) {
      return (number * p.groups + blockIdx.y) * p.features_pad + first_feature;
    };
    *to = {p.checkpoints.mean + row(mean) * W,
           p.checkpoints.log_mass + row(tile),
           p.groups * p.features_pad,
           static_cast<int>(p.features_pad - first_feature),
           static_cast<int>(p.features - first_feature),
           static_cast<int>(p.means.unit) / kTile};
  }
  using Traits = SummarizeTraits<T, W>;
  KeyStream<T, W, Traits::kThreads> stream(p.keys, p.map, GetWorkTile(p.work, blockIdx.x),
                                           blockIdx.y, shared + Traits::kStream, threadIdx.x);
  SummarizeRows<T, W>(p, stream, [&](const auto& state, int tile) {
    if (stream.exists(tile + 1)) StoreCheckpoint<T, W>(state, *to, p.map, tile + 1, threadIdx.x);
  });
}

}  // namespace cuda
}  // namespace performer
