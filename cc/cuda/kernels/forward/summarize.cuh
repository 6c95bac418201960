// Bidirectional attention, first half: keys and values to a state of M features.
//   log_mass[m] = log sum_j exp(b[m, j])      mean[m] = softmax_j(b[m, :]) v
//
// Grid: (splits of all sequences, key/value heads, feature blocks). A block walks the keys of
// its split in tiles of 64, with its features as the rows of the softmax. The states of splits are
// then merged in their order (forward/merge_states.cuh).
#pragma once
#include "cuda/device/online_softmax.cuh"
#include "cuda/device/row_pipeline.cuh"

namespace performer {
namespace cuda {

template <class T>
struct SummarizeParams : KeyReadParams<T> {
  float* log_mass = nullptr;  // [splits, G, M]
  float* mean = nullptr;      // [splits, G, M, E]
};

template <class T, int W>
struct SummarizeTraits {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  // Limited by registers: float32 operands are twice as large.
  static constexpr int kRowTiles = kIs16Bit<T> && W <= 128 ? 2 : 1;
  static constexpr int kFeatures = 16 * kRowTiles * kWarps;
  static constexpr bool kInRegisters = kIs16Bit<T> && W == 64;  // operands of features
  static_assert(kFeatures % kFeatureUnit == 0);

  // Shared memory, in bytes.
  static constexpr int kTileBytes = kTile * W * sizeof(T);
  static constexpr int kKeys = kInRegisters ? 0 : kFeatures * W * static_cast<int>(sizeof(T));
  static constexpr int kValues = kKeys + 2 * kTileBytes;
  static constexpr int kStream = kValues + 2 * kTileBytes;
  static constexpr int kBytes = kStream + KeyStream<T, W, kThreads>::kSharedBytes;
  static_assert(kBytes <= MaxSharedBytes(W, kWarps));
};

// Writes log_mass and mean of the features that the block has.
template <class T, int W, int kRowTiles>
PERFORMER_DEVICE void StoreState(const Softmax<T, W, kRowTiles>& state, const SummarizeParams<T>& p,
                                 int64_t head, int first_feature, int warp, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum;
      const float inverse = state.Inverse(m, e, &sum);
      const int feature = first_feature + (warp * kRowTiles + m) * 16 + g + 8 * e;
      if (feature >= p.features) continue;
      const int64_t row =
          (static_cast<int64_t>(blockIdx.x) * p.groups + head) * p.features + feature;
      if (t == 0)
        p.log_mass[row] =
            inverse == 0.f ? -kInfinity : state.row_max[m][e] * p.map.root + logf(sum);
#pragma unroll
      for (int n = 0; n < W / 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = n * 8 + 2 * t + c;
          if (column < p.keys.value.width)
            p.mean[row * p.keys.value.width + column] =
                inverse == 0.f ? 0.f : state.acc[m][n][2 * e + c] * inverse;
        }
    }
}

// The keys of `stream`, a KeyStream or what walks its rows in another order. after_tile(state, tile)
// is called after each tile.
template <class T, int W, class Stream, class AfterTile>
PERFORMER_DEVICE void SummarizeRows(const SummarizeParams<T>& p, Stream& stream,
                                    AfterTile after_tile) {
  using Traits = SummarizeTraits<T, W>;
  constexpr int kThreads = Traits::kThreads, kRowTiles = Traits::kRowTiles;
  PERFORMER_SHARED_MEMORY(shared);
  T* const features = reinterpret_cast<T*>(shared);  // [kFeatures][W], unless kept in registers
  T* const keys = reinterpret_cast<T*>(shared + Traits::kKeys);      // [2] tiles
  T* const values = reinterpret_cast<T*>(shared + Traits::kValues);  // [2] tiles
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int64_t head = blockIdx.y;
  const int first_feature = blockIdx.z * Traits::kFeatures;

  const T* w = p.projection.At(p.projection.heads == 1 ? 0 : head, p.features_pad, W) +
               static_cast<int64_t>(first_feature) * W;
  // In the last feature block, rows past features_pad repeat an earlier one; their results are
  // not written.
  const int rows_here = static_cast<int>(p.features_pad) - first_feature;
  uint32_t w_registers[kRowTiles][W / 16][kFragment<T>];
  if constexpr (Traits::kInRegisters) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int s = 0; s < W / 16; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = (warp * kRowTiles + m) * 16 + g + 8 * (i & 1);
          w_registers[m][s][i] =
              *Pair(w + (row < rows_here ? row : 0) * W + s * 16 + 2 * t + 8 * (i >> 1));
        }
  } else {
    CopyOperand<T, W, Traits::kFeatures, kThreads>(features, w, rows_here, tid);
  }
  const auto rows = [&](uint32_t (&a)[kFragment<T>], int m, int s) {
    LoadRowOperand<Traits::kInRegisters, T, W>(a, w_registers, features, warp * kRowTiles * 16, m,
                                               s, lane);
  };

  Softmax<T, W, kRowTiles> state;
  state.Init();
  stream.LoadKeyBias(0, tid);
  stream.StoreKeyBias(0, tid);
  __syncthreads();  // the masks of the first tile are visible
  stream.Issue(0, 0, keys, values, tid);
  stream.LoadKeyBias(1, tid);
#pragma unroll 1
  for (int tile = 0; stream.exists(tile); ++tile) {
    const int buffer = tile & 1, other = buffer ^ 1;
    T* const tile_keys = keys + buffer * kTile * W;
    CpAsyncWait<0>();
    stream.ComputeBias(buffer, tile_keys, tid);
    stream.StoreKeyBias(other, tid);
    __syncthreads();  // the tile is complete, and nobody reads the other buffer any more
    if (stream.exists(tile + 1)) {
      stream.Issue(tile + 1, other, keys + other * kTile * W, values + other * kTile * W, tid);
      stream.LoadKeyBias(tile + 2, tid);
    }
    state.Step(rows, tile_keys, values + buffer * kTile * W, stream.bias + buffer * kTile, p.map,
               lane);
    after_tile(state, tile);
  }
  StoreState<T, W>(state, p, head, first_feature, warp, lane);
}

template <class T, int W>
__global__ void __launch_bounds__(128, 2) SummarizeKernel(SummarizeParams<T> p) {
  using Traits = SummarizeTraits<T, W>;
  PERFORMER_SHARED_MEMORY(shared);
  KeyStream<T, W, Traits::kThreads> stream(p.keys, p.map, GetWorkTile(p.work, blockIdx.x),
                                           blockIdx.y, shared + Traits::kStream, threadIdx.x);
  SummarizeRows<T, W>(p, stream, [](const auto&...) {});
}

}  // namespace cuda
}  // namespace performer
