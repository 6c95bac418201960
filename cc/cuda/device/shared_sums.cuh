// Sums over tokens that are kept in shared memory while a chunk needs the registers.
#pragma once
#include "cuda/kernels/backward/common.cuh"

namespace performer {
namespace cuda {

// Sums of a warp's 16 features x W. In shared memory (kShared) each thread has elements of its own,
// so that no barrier is needed. Otherwise they are registers.
template <int W, int kThreads, bool kShared>
class KeptSums {
 public:
  static constexpr int kBytes = W / 8 * kThreads * static_cast<int>(sizeof(float4));

  // `shared`: kBytes, to multiples of 16.
  PERFORMER_DEVICE KeptSums(unsigned char* shared, int tid)
      : elements_(reinterpret_cast<float4*>(shared) + tid) {
#pragma unroll
    for (int n = 0; n < W / 8; ++n) Set(n, 0.f, 0.f, 0.f, 0.f);
  }

  // Adds x (of kColumns tokens) times tokens, as SumTokens does.
  template <class T, int kColumns>
  PERFORMER_DEVICE void Add(const BackwardTile<1, kColumns>& x, const T* tokens, int lane) {
    uint32_t a[kColumns / 16][kFragment<T>];
#pragma unroll
    for (int s = 0; s < kColumns / 16; ++s) PackA<T>(a[s], x[0][2 * s], x[0][2 * s + 1]);
    Add<T>(a, tokens, lane);
  }
  // The same of x as operands.
  template <class T, int kStrides>
  PERFORMER_DEVICE void Add(const uint32_t (&a)[kStrides][kFragment<T>], const T* tokens,
                            int lane) {
    lane = Opaque(lane);
#pragma unroll
    for (int n = 0; n < W / 8; n += 2) {
      float c0[4], c1[4];
      Get(n, c0);
      Get(n + 1, c1);
#pragma unroll
      for (int s = 0; s < kStrides; ++s) {
        uint32_t b[kFragment<T>];
        LoadBTrans<T, W>(b, tokens, s * 16, n * 8, lane);
        Mma<T>(c0, c1, a[s], b);
      }
      Set(n, c0[0], c0[1], c0[2], c0[3]);
      Set(n + 1, c1[0], c1[1], c1[2], c1[3]);
    }
  }

  PERFORMER_DEVICE void Read(float (&x)[1][W / 8][4]) const {
#pragma unroll
    for (int n = 0; n < W / 8; ++n) Get(n, x[0][n]);
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
  float4 registers_[W / 8];
};

}  // namespace cuda
}  // namespace performer
