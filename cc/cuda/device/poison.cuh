// Values that are not finite. A product that sums over rows of values would bring them to rows that
// do not see them, as 0 inf is NaN. So they are replaced by 0, and where they were is remembered.
#pragma once
#include "cuda/device/row_pipeline.cuh"

namespace performer {
namespace cuda {

// Neither infinite nor NaN.
PERFORMER_DEVICE bool IsFinite(BFloat16 x) { return (x.bits & 0x7f80) != 0x7f80; }
PERFORMER_DEVICE bool IsFinite(Half x) { return (x.bits & 0x7c00) != 0x7c00; }
PERFORMER_DEVICE bool IsFinite(float x) { return (AsBits(x) & 0x7f800000u) != 0x7f800000u; }

// Replaces infinities and NaN of a tile [kTile][W] by 0. poison[e], INT32_MAX before, becomes the
// first row that held one in column e. The order of atomicMin does not matter. Each thread reads the
// numbers that it copied itself with CopyRows, so no barrier is needed before.
template <class T, int W, int kThreads>
PERFORMER_DEVICE void ZeroNonFinite(T* values, int* poison, int tid) {
  constexpr int kChunks = W / kChunk<T>, kStride = kThreads / kChunks;
  tid = Opaque(tid);
  const int column = tid % kChunks * kChunk<T>;
#pragma unroll 1
  for (int row = tid / kChunks; row < kTile; row += kStride) {
    T* const x = values + At<T, W>(row, column);
    bool non_finite = false;
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) non_finite |= !IsFinite(x[i]);
    if (!non_finite) continue;
#pragma unroll 1
    for (int i = 0; i < kChunk<T>; ++i)
      if (!IsFinite(x[i])) {
        x[i] = FromFloat<T>(0.f);
        atomicMin(poison + column + i, row);
      }
  }
}

}  // namespace cuda
}  // namespace performer
