// Operands in T, padded, from float32: projections and means of a state.
#pragma once
#include "cuda/call.cuh"

namespace performer {
namespace cuda {

struct PackParams {
  const float* from = nullptr;  // [matrices][rows][width]
  const float* log_mass =
      nullptr;         // [matrices][rows] or nullptr: rows of -inf are written as zeros
  void* to = nullptr;  // T [matrices][rows_pad][W], zeros in the padding
  int64_t matrices = 0, rows = 0, rows_pad = 0;
  int width = 0;
};

// One warp for each row of the result: numbers are rounded once.
template <class T, int W>
__global__ void __launch_bounds__(256) PackKernel(PackParams p) {
  const int64_t number = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (number >= p.matrices * p.rows_pad) return;
  const int64_t matrix = number / p.rows_pad, row = number % p.rows_pad;
  const int64_t source = matrix * p.rows + row;
  const bool given = row < p.rows && (p.log_mass == nullptr || p.log_mass[source] != -kInfinity);
  T* to = static_cast<T*>(p.to) + number * W;
  for (int column = threadIdx.x % 32; column < W; column += 32)
    to[column] = FromFloat<T>(given && column < p.width ? p.from[source * p.width + column] : 0.f);
}

}  // namespace cuda
}  // namespace performer
