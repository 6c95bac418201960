// Sums that are kept in shared memory while registers are needed elsewhere.
#pragma once
#include "cuda/kernels/backward/common.cuh"

namespace performer {
namespace cuda {

// Sums of a warp's 16 rows x kColumns. In shared memory (kShared) each thread has elements of its
// own, so that no barrier is needed. Otherwise they are registers.
template <int kColumns, int kThreads, bool kShared>
class KeptSums {
 public:
  static constexpr int kBytes = kColumns / 8 * kThreads * static_cast<int>(sizeof(float4));

  // `shared`: kBytes, to multiples of 16.
  PERFORMER_DEVICE KeptSums(unsigned char* shared, int tid)
      : elements_(reinterpret_cast<float4*>(shared) + tid) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) Set(n, 0.f, 0.f, 0.f, 0.f);
  }

  // Adds the operands x times rows of a tile [16 kStrides][W], of which columns from c0 on.
  template <class T, int W, int kStrides>
  PERFORMER_DEVICE void Add(const uint32_t (&x)[kStrides][kFragment<T>], const T* tile, int c0,
                            int lane) {
    lane = Opaque(lane);
#pragma unroll
    for (int n = 0; n < kColumns / 8; n += 2) {
      float sum0[4], sum1[4];
      Get(n, sum0);
      Get(n + 1, sum1);
#pragma unroll
      for (int s = 0; s < kStrides; ++s) {
        uint32_t b[kFragment<T>];
        LoadBTrans<T, W>(b, tile, s * 16, c0 + n * 8, lane);
        Mma<T>(sum0, sum1, x[s], b);
      }
      Set(n, sum0[0], sum0[1], sum0[2], sum0[3]);
      Set(n + 1, sum1[0], sum1[1], sum1[2], sum1[3]);
    }
  }

  PERFORMER_DEVICE void Read(float (&x)[kColumns / 8][4]) const {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) Get(n, x[n]);
  }

 private:
  PERFORMER_DEVICE void Get(int n, float (&x)[4]) const {
    const float4 y = kShared ? elements_[n * kThreads] : registers_[n];
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
  }
  PERFORMER_DEVICE void Set(int n, float x, float y, float z, float w) {
    (kShared ? elements_[n * kThreads] : registers_[n]) = float4{x, y, z, w};
  }

  float4* const elements_;
  float4 registers_[kColumns / 8];
};

}  // namespace cuda
}  // namespace performer
