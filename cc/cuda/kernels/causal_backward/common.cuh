// What the kernels of the causal gradient share.
//
//   A_ij  = sum_m exp(a_im + b_mj - lse_i)  for j <= i
//   dA_ij = grad_out_i . v_j - delta_i
//
// where exp(x - lse) = exp(x - row_max) 2^-log_sum, and values are less an origin in float32
// (causal_backward/value_origin.cuh).
//
// Rows are taken in tiles of kTile side by side. What lies before a tile, or after it, is a state. The
// pairs of a tile's own rows are taken one by one, relative to anchors (causal/causal.cuh).
#pragma once
#include "core/causal_cut.h"
#include "cuda/kernels/backward/common.cuh"
#include "cuda/kernels/backward/value_origin.cuh"
#include "cuda/kernels/causal/layout.cuh"

namespace performer {
namespace cuda {

// Checkpoints of means and of reverse states are stored each kCheckpointTiles tiles of a split.
// Where that is 2, the blocks of the other tiles advance them by one tile, whose rows they read
// too.
template <class T, int W>
inline constexpr int kCheckpointTiles = kIs16Bit<T> && W == 64 ? 2 : 1;
static_assert(kSplitUnit % (2 * kTile) == 0, "a split begins with a tile that has a checkpoint");

// What all kernels of the causal gradient are given.
template <class T>
struct CausalGradientParams : CausalRowsParams<T> {
  RowsOf<const T> grad_out;  // [B L, H, E]
  RowStatistics statistics;  // [B L, H], of CausalQueryGradientKernel
  // [splits, 2, G, W] in float32, else nullptr: of the first tile of a split and of the others.
  const float* origin = nullptr;
};

// The origin [W] of the values of a split's first tile, or of its other tiles; nullptr in 16 bits.
template <class T, int W>
PERFORMER_DEVICE const float* OriginOfTile(const float* origin, int64_t split, int64_t groups,
                                           int64_t group, bool other) {
  return kIs16Bit<T> ? nullptr : origin + ((split * 2 + other) * groups + group) * W;
}

// Features relative to an anchor, and sums over rows, do not fit half's range. Where T is half
// they, and what they are multiplied by, are operands in bfloat16. Only log-features come from
// products in half.
template <class T>
using Ranged = std::conditional_t<std::is_same_v<T, Half>, BFloat16, T>;
template <class T>
inline constexpr bool kHasRanged = std::is_same_v<T, Half>;

// In 16 bits reverse states, and the values that they are multiplied by, are halves: their product
// nearly cancels against r, and bfloat16 has too few bits for that. A row of halves has a power of
// two in common, which its largest number sets.
template <class T>
using ReverseNumber = std::conditional_t<kIs16Bit<T>, Half, float>;

struct HalfScale {
  float to_half, from_half;  // powers of two; their product is 1
};
// Numbers up to `largest`, times to_half, fit half, and have all its bits from 2^-28 largest on
// (but where that is below 2^-128).
PERFORMER_DEVICE HalfScale ScaleOfHalf(float largest) {
  const int exponent = static_cast<int>(AsBits(largest) & 0x7f800000u);  // of 2^e >= largest / 2
  const int bounded = min(max(exponent, 27 << 23), 254 << 23);           // infinity stays infinity
  return {AsFloat((268u << 23) - static_cast<uint32_t>(bounded)),
          AsFloat(static_cast<uint32_t>(bounded) - (14u << 23))};
}

// What numbers times to_half are less than.
inline constexpr float kLargestHalf = 0x1p15f;

// The largest of |x|, of numbers in registers. NaN does not count.
template <int kCount>
PERFORMER_DEVICE float Largest(const float (&x)[kCount]) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest = fmaxf(largest, fabsf(x[i]));
  return largest;
}
// The largest over kLanes neighbouring lanes.
template <int kLanes>
PERFORMER_DEVICE float LargestOfLanes(float largest) {
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
  return largest;
}

// x = factor times the numbers in 16 bytes.
template <class N>
PERFORMER_DEVICE void UnpackChunk(float (&x)[kChunk<N>], const uint4& chunk, float factor) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kIs16Bit<N>)
      x[2 * i] = factor * Low<N>(words[i]), x[2 * i + 1] = factor * High<N>(words[i]);
    else
      x[i] = factor * AsFloat(words[i]);
  }
}
template <class N>
PERFORMER_DEVICE uint4 PackChunk(const float (&x)[kChunk<N>], float factor) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kIs16Bit<N>)
      words[i] = Pack<N>(factor * x[2 * i], factor * x[2 * i + 1]);
    else
      words[i] = AsBits(factor * x[i]);
  }
  return {words[0], words[1], words[2], words[3]};
}

// Converts half to bfloat16; `to` may be `from`. Each thread converts what it copied itself with
// CopyRows or CopyOperand, so no barrier is needed before. Only the columns from c0 on are
// converted where `to` has fewer, [kRows][kColumns].
template <class T, int W, int kRows, int kThreads, int kColumns = W>
PERFORMER_DEVICE void MakeRanged(Ranged<T>* to, const T* from, int tid, int c0 = 0) {
  if constexpr (kHasRanged<T>) {
    constexpr int kChunks = W / kChunk<T>, kStride = kThreads / kChunks;
    tid = Opaque(tid);
    const int column = tid % kChunks * kChunk<T>;
    if (kColumns < W && (column < c0 || column >= c0 + kColumns)) return;
#pragma unroll 2
    for (int row = tid / kChunks; row < kRows; row += kStride) {
      const T* const source = from + At<T, W>(row, column);
      Ranged<T>* const chunk = to + At<T, kColumns>(row, kColumns < W ? column - c0 : column);
#pragma unroll
      for (int i = 0; i < kChunk<T>; i += 2) {
        const float2 x = LoadPair(source + i);
        *Pair(chunk + i) = Pack<Ranged<T>>(x.x, x.y);
      }
    }
  }
}

}  // namespace cuda
}  // namespace performer
