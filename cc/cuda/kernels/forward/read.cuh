// Bidirectional attention, second half: the queries read the state.
//   out[i] = softmax_m(a[i, :] + log_mass) mean
//
// Grid: (row tiles of all sequences, query heads). A block holds its queries and walks the features
// in tiles of 64, rows of the projection w and of mean, which are double buffered.
#pragma once
#include "cuda/device/online_softmax.cuh"
#include "cuda/device/row_pipeline.cuh"

namespace performer {
namespace cuda {

template <class T>
struct ReadParams : StateReadParams<T> {
  RowsOf<T> out;  // [B L, H, E]
};

// The pointers of a block, kept in shared memory because registers are short.
template <class T>
struct ReadPointers {
  const T *projection, *mean;            // [M_pad, W] of the head
  const float *log_mass, *feature_bias;  // [M] of the head
  T* out;                                // [rows, .., E], strided: the block's first row
  int rows;
};

template <class T, int W>
struct ReadTraits {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kIs16Bit<T> && W <= 128 ? 2 : 1;
  static constexpr int kRows = 16 * kRowTiles * kWarps;
  static constexpr bool kInRegisters = kIs16Bit<T> && W == 64;  // operands of queries

  // Shared memory, in bytes.
  static constexpr int kTileBytes = kTile * W * sizeof(T);
  static constexpr int kProjection = kRows * W * static_cast<int>(sizeof(T));
  static constexpr int kMean = kProjection + 2 * kTileBytes;
  static constexpr int kBias = kMean + 2 * kTileBytes;
  static constexpr int kPointers = kBias + 2 * kTile * 4;
  static constexpr int kBytes = kPointers + static_cast<int>(sizeof(ReadPointers<T>));
  static_assert(kBytes <= MaxSharedBytes(W, kWarps));
};

// Divides by the sums of rows and writes the rows that the block has.
template <class T, int W, int kRowTiles>
PERFORMER_DEVICE void StoreOutputs(const Softmax<T, W, kRowTiles>& softmax,
                                   const ReadPointers<T>& block, const RowsOf<T>& out, int warp,
                                   int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum;
      const float inverse = softmax.Inverse(m, e, &sum);
      const int row = (warp * kRowTiles + m) * 16 + g + 8 * e;
      if (row >= block.rows) continue;
      T* to = block.out + static_cast<int64_t>(row) * out.stride;
#pragma unroll
      for (int n = 0; n < W / 8; ++n)
        StoreColumns(to, n * 8 + 2 * t, out.width, out.aligned,
                     inverse == 0.f ? 0.f : softmax.acc[m][n][2 * e] * inverse,
                     inverse == 0.f ? 0.f : softmax.acc[m][n][2 * e + 1] * inverse);
    }
}

template <class T, int W>
__global__ void __launch_bounds__(128, 2) ReadKernel(ReadParams<T> p) {
  using Traits = ReadTraits<T, W>;
  constexpr int kThreads = Traits::kThreads, kRowTiles = Traits::kRowTiles;
  PERFORMER_SHARED_MEMORY(shared);
  T* const queries = reinterpret_cast<T*>(shared);                           // [kRows][W]
  T* const projection = reinterpret_cast<T*>(shared + Traits::kProjection);  // [2] tiles
  T* const mean = reinterpret_cast<T*>(shared + Traits::kMean);              // [2] tiles
  float* const bias = reinterpret_cast<float*>(shared + Traits::kBias);      // [2][kTile]
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  ReadPointers<T>* const block = reinterpret_cast<ReadPointers<T>*>(shared + Traits::kPointers);
  {
    const WorkTile work = GetWorkTile(p.work, blockIdx.x);
    const int64_t head = blockIdx.y, heads = p.query.heads, group = head / (heads / p.groups);
    const int64_t row = work.first_row + work.begin;
    const int rows = static_cast<int>(work.end - work.begin);
    if (tid == 0) {
      const int64_t state = (p.state_count == 1 ? 0 : work.sequence) * p.groups + group;
      *block = {
          p.projection.At(QueryHeadIndex(p.projection.heads, head, heads, group), p.features_pad,
                          W),
          p.mean + state * p.features_pad * W,
          p.log_mass + state * p.features,
          p.feature_bias + QueryHeadIndex(p.feature_bias_heads, head, heads, group) * p.features,
          p.out.Row(row, head),
          rows};
    }
    CopyRows<T, W, Traits::kRows, kThreads>(queries, p.query.Row(row, head), 0, p.query, tid,
                                            [&](int r) { return r < rows; });
  }
  __syncthreads();  // the pointers are visible
  const auto load_tile = [&](int first, int buffer) {
    CopyOperand<T, W, kTile, kThreads>(projection + buffer * kTile * W,
                                       block->projection + first * W, kTile, tid);
    CopyOperand<T, W, kTile, kThreads>(mean + buffer * kTile * W, block->mean + first * W, kTile,
                                       tid);
    CpAsyncCommit();
    const int m = first + tid;
    if (tid < kTile)
      bias[buffer * kTile + tid] =
          m < p.features ? (block->log_mass[m] + block->feature_bias[m]) * p.map.inverse_root
                         : -kInfinity;
  };
  load_tile(0, 0);
  uint32_t q[kRowTiles][W / 16][kFragment<T>];
  const auto rows = [&](uint32_t (&a)[kFragment<T>], int m, int s) {
    LoadRowOperand<Traits::kInRegisters, T, W>(a, q, queries, warp * kRowTiles * 16, m, s, lane);
  };
  Softmax<T, W, kRowTiles> softmax;
  softmax.Init();
  const int features = static_cast<int>(p.features_pad);
#pragma unroll 1
  for (int first = 0; first < features; first += kTile) {
    const int buffer = first / kTile & 1;
    CpAsyncWait<0>();
    __syncthreads();  // the tile is complete, and nobody reads the other buffer any more
    if (first + kTile < features) load_tile(first + kTile, buffer ^ 1);
    if constexpr (Traits::kInRegisters) {
      if (first == 0)
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int s = 0; s < W / 16; ++s)
            LoadA<T, W>(q[m][s], queries, (warp * kRowTiles + m) * 16, s * 16, lane);
    }
    softmax.Step(rows, projection + buffer * kTile * W, mean + buffer * kTile * W,
                 bias + buffer * kTile, p.map, lane);
  }
  StoreOutputs<T, W>(softmax, *block, p.out, warp, lane);
}

}  // namespace cuda
}  // namespace performer
