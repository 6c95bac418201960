// What values are taken less in the gradients: attention to values less a vector is attention to the
// values, less that vector. Its gradients stay the same, but what values have in common no longer
// hides their differences in rounding errors.
#pragma once
#include "cuda/device/kernel_params.cuh"

namespace performer {
namespace cuda {

// An origin is 0 where it would not be finite.
PERFORMER_DEVICE float FiniteOrZero(float x) { return x - x == 0.f ? x : 0.f; }

// origin[matrix] = the average of `mean` over the features that have seen a key; 0 if none has.
struct ValueOriginParams {
  const float *log_mass = nullptr, *mean = nullptr;  // [matrices, M], [matrices, M, E]
  int64_t features = 0;
  int width = 0;
  float* origin = nullptr;  // [matrices, W], 0 from column E on
};

// Grid: one block for each matrix, one thread for each of the W columns.
static __global__ void __launch_bounds__(256) ValueOriginKernel(ValueOriginParams p) {
  const int column = threadIdx.x;
  const int64_t first = blockIdx.x * p.features;
  float sum = 0, count = 0;
  for (int64_t row = first; row < first + p.features; ++row) {
    if (p.log_mass[row] == -kInfinity) continue;
    count += 1;
    if (column < p.width) sum += p.mean[row * p.width + column];
  }
  p.origin[static_cast<int64_t>(blockIdx.x) * blockDim.x + column] =
      count == 0.f ? 0.f : FiniteOrZero(sum / count);
}

// Rows of a tile of values become less the origin [W]. Only in float32: in 16 bits values are exact
// and the difference is not. Each thread takes the values that it copied itself with CopyRows, so
// no barrier is needed before.
template <class T, int W, int kRows, int kThreads>
PERFORMER_DEVICE void SubtractOrigin(T* values, const float* origin, int tid) {
  if constexpr (!kIs16Bit<T>) {
    constexpr int kChunks = W / kChunk<T>, kStride = kThreads / kChunks;
    static_assert(kChunk<T> == 4);
    tid = Opaque(tid);
    const int column = tid % kChunks * kChunk<T>;
    const float4 less = *reinterpret_cast<const float4*>(origin + column);
#pragma unroll 2
    for (int r = tid / kChunks; r < kRows; r += kStride) {
      float4& x = *reinterpret_cast<float4*>(values + At<T, W>(r, column));
      x = float4{x.x - less.x, x.y - less.y, x.z - less.z, x.w - less.w};
    }
  }
}

}  // namespace cuda
}  // namespace performer
