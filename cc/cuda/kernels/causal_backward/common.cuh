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

// Converts half to bfloat16; `to` may be `from`. Each thread converts what it copied itself with
// CopyRows or CopyOperand, so no barrier is needed before.
template <class T, int W, int kRows, int kThreads>
PERFORMER_DEVICE void MakeRanged(Ranged<T>* to, const T* from, int tid) {
  if constexpr (kHasRanged<T>) {
    constexpr int kChunks = W / kChunk<T>, kStride = kThreads / kChunks;
    tid = Opaque(tid);
#pragma unroll 2
    for (int row = tid / kChunks; row < kRows; row += kStride) {
      const int at = At<T, W>(row, tid % kChunks * kChunk<T>);
#pragma unroll
      for (int i = 0; i < kChunk<T>; i += 2) {
        const float2 x = LoadPair(from + at + i);
        *Pair(to + at + i) = Pack<Ranged<T>>(x.x, x.y);
      }
    }
  }
}

}  // namespace cuda
}  // namespace performer
