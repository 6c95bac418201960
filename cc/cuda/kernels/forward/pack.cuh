// Rounds float32 matrices to T and pads them, as operands of products: projections and means.
#pragma once
#include "cuda/device/kernel_params.cuh"

namespace performer {
namespace cuda {

struct PackParams {
  const float* from = nullptr;      // [matrices, rows, width]
  const float* log_mass = nullptr;  // [matrices, rows]: rows of -inf become zeros; or nullptr
  const float* origin = nullptr;    // [matrices, W]: what given rows become less by; or nullptr
  void* to = nullptr;               // T [matrices, rows_pad, W], with zeros in the padding
  int64_t matrices = 0, rows = 0, rows_pad = 0;
  int width = 0;
};

// Grid: one warp for each row of the result.
template <class T, int W>
__global__ void __launch_bounds__(256) PackKernel(PackParams p) {
  const int64_t number = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (number >= p.matrices * p.rows_pad) return;
  const int64_t matrix = number / p.rows_pad, row = number % p.rows_pad;
  const int64_t source = matrix * p.rows + row;
  const bool given = row < p.rows && (p.log_mass == nullptr || p.log_mass[source] != -kInfinity);
  T* to = static_cast<T*>(p.to) + number * W;
  for (int column = threadIdx.x % 32; column < W; column += 32) {
    float x = given && column < p.width ? p.from[source * p.width + column] : 0.f;
    if (given && p.origin != nullptr) x -= p.origin[matrix * W + column];
    to[column] = FromFloat<T>(x);
  }
}

// The same numbers as A operands (mma_tile.cuh), with the registers of a lane side by side, so that
// a warp loads an operand from global memory at once:
//   uint32 [matrices, rows_pad / 16, W / 16, 32 lanes, kFragment]
// Grid: one thread for each register.
template <class T, int W>
__global__ void __launch_bounds__(256) PackOperandsKernel(PackParams p) {
  constexpr int kRegisters = kFragment<T>;
  int64_t rest = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t number = rest;
  const int i = static_cast<int>(rest % kRegisters);
  rest /= kRegisters;
  const int lane = static_cast<int>(rest % 32);
  rest /= 32;
  const int stride = static_cast<int>(rest % (W / 16));
  rest /= W / 16;
  const int64_t tiles = p.rows_pad / 16;
  if (rest >= p.matrices * tiles) return;
  const int64_t matrix = rest / tiles, row = rest % tiles * 16 + lane / 4 + 8 * (i & 1);
  const auto at = [&](int column) {
    return row < p.rows && column < p.width ? p.from[(matrix * p.rows + row) * p.width + column]
                                            : 0.f;
  };
  uint32_t bits;
  if constexpr (kIs16Bit<T>) {
    const int column = stride * 16 + 2 * (lane & 3) + 8 * (i >> 1);
    bits = Pack<T>(at(column), at(column + 1));
  } else {
    bits = AsBits(at(stride * 16 + 2 * (lane & 3) + (i >> 1 & 1) + 8 * (i >> 2)));
  }
  static_cast<uint32_t*>(p.to)[number] = bits;
}

}  // namespace cuda
}  // namespace performer
