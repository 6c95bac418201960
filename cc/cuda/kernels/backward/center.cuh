// The gradient of a state, prepared for the dkv kernel: the operand dmean, and
//
//   c[m] = dmean . mean - dlog_mass
//
// c is made of the operand as it is rounded, so that the two cancel exactly. In float32 it is that of
// means less an origin (backward/value_origin.cuh). It is 0 where nothing
// was seen. For half both are multiplied by GradStateScale.
//
// Grid: one warp for each row of the operand.
#pragma once
#include "cuda/kernels/backward/common.cuh"

namespace performer {
namespace cuda {

template <class T>
struct CenterParams {
  const float *log_mass = nullptr, *mean = nullptr;            // [count, G, M], [count, G, M, E]
  const float *grad_log_mass = nullptr, *grad_mean = nullptr;  // likewise
  int64_t matrices = 0, features = 0, features_pad = 0;        // matrices: count G
  int width = 0;
  T* operand = nullptr;           // [matrices, M_pad, W]
  float* center = nullptr;        // [matrices, M]
  float* bias_part = nullptr;     // [matrices, M]: dlog_mass, 0 where nothing was seen
  const float* origin = nullptr;  // [matrices, W] in float32, else nullptr
  const float* peak = nullptr;    // [matrices], of GradPeakKernel; only for half
};

template <class T, int W>
__global__ void __launch_bounds__(256) CenterKernel(CenterParams<T> p) {
  const int64_t number = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (number >= p.matrices * p.features_pad) return;
  const int64_t matrix = number / p.features_pad, feature = number % p.features_pad;
  const int64_t row = matrix * p.features + feature;
  const bool given = feature < p.features && p.log_mass[row] != -kInfinity;
  const float scale = std::is_same_v<T, Half> ? GradStateScale<T>(p.peak[matrix]) : 1.f;
  float center = 0;
#pragma unroll
  for (int i = 0; i < W / 32; ++i) {
    const int column = lane + 32 * i;
    const bool here = given && column < p.width;
    const T x = FromFloat<T>(here ? p.grad_mean[row * p.width + column] * scale : 0.f);
    p.operand[number * W + column] = x;
    if (!here) continue;
    const float less = kIs16Bit<T> ? 0.f : p.origin[matrix * W + column];
    center += ToFloat(x) * (p.mean[row * p.width + column] - less);
  }
  center = WarpSum(center);
  if (lane != 0 || feature >= p.features) return;
  p.center[row] = given ? center - p.grad_log_mass[row] * scale : 0.f;
  p.bias_part[row] = given ? p.grad_log_mass[row] : 0.f;
}

// peak[matrix] = the largest |dmean| and |dlog_mass| of it. Grid: one block for each matrix.
struct GradPeakParams {
  const float *grad_log_mass = nullptr, *grad_mean = nullptr;  // [matrices, M(, E)]
  int64_t features = 0, width = 0;
  float* peak = nullptr;  // [matrices]
};

inline constexpr int kPeakThreads = 256;
static __global__ void __launch_bounds__(kPeakThreads) GradPeakKernel(GradPeakParams p) {
  PERFORMER_SHARED_MEMORY(shared);
  float* const warp_max = reinterpret_cast<float*>(shared);  // [warps]
  const int64_t first = blockIdx.x * p.features, size = p.features * p.width;
  const int tid = threadIdx.x;
  float largest = 0;
  for (int64_t i = tid; i < p.features; i += kPeakThreads)
    largest = fmaxf(largest, fabsf(p.grad_log_mass[first + i]));
  for (int64_t i = tid; i < size; i += kPeakThreads)
    largest = fmaxf(largest, fabsf(p.grad_mean[first * p.width + i]));
  largest = WarpMax(largest);
  if (tid % 32 == 0) warp_max[tid / 32] = largest;
  __syncthreads();  // maxima of all warps
  if (tid != 0) return;
  for (int i = 0; i < kPeakThreads / 32; ++i) largest = fmaxf(largest, warp_max[i]);
  p.peak[blockIdx.x] = largest;
}

}  // namespace cuda
}  // namespace performer
