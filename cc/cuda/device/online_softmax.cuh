// One step of softmax(rows x columns + bias) @ values for one warp: the core that summarize and
// read share (online softmax, as in flash attention, arXiv:2205.14135).
//
//              rows         columns             values              bias of a column
//                           (tile [64][W])      (tile [64][W])
//   summarize  features w   keys                values              -|k|^2/2 + key_bias
//   read       queries      features w          mean                log_mass + feature_bias
//
// An exponential is exp2((x - row_max) * unit). One fused exp2(x * unit - row_max * unit) would
// save an addition, but the rounding of row_max * unit alone overflows for logits beyond 1e9, and
// finite inputs must give finite outputs.
#pragma once
#include "cuda/device/kernel_params.cuh"

namespace performer {
namespace cuda {

// The A operand of row tile m and summed indices 16 s .. 16 s + 15 for the softmax of a warp: from
// `registers`, or from its rows [16 kRowTiles][W] in shared memory, from first_row on.
template <bool kInRegisters, class T, int W, int kRowTiles>
PERFORMER_DEVICE void LoadRowOperand(uint32_t (&a)[kFragment<T>],
                                     const uint32_t (&registers)[kRowTiles][W / 16][kFragment<T>],
                                     const T* rows, int first_row, int m, int s, int lane) {
  if constexpr (kInRegisters) {
#pragma unroll
    for (int i = 0; i < kFragment<T>; ++i) a[i] = registers[m][s][i];
  } else {
    LoadA<T, W>(a, rows, first_row + m * 16, s * 16, lane);
  }
}

// 16 * kRowTiles rows, W columns of values. rows(a, m, s) loads the A operand of row tile m and
// summed indices 16 s .. 16 s + 15.
template <class T, int W, int kRowTiles>
struct Softmax {
  float acc[kRowTiles][W / 8][4], row_max[kRowTiles][2];
  float sum[kRowTiles][2];  // this lane's share of the row

  PERFORMER_DEVICE void Init() {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < W / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.f;
#pragma unroll
      for (int e = 0; e < 2; ++e) row_max[m][e] = -kInfinity, sum[m][e] = 0.f;
    }
  }

  template <class Rows>
  PERFORMER_DEVICE void Step(Rows rows, const T* columns, const T* values, const float* bias,
                             const Map& map, int lane) {
    lane = Opaque(lane);
    float x[kRowTiles][8][4];
    Logits(rows, columns, bias, map, lane, x);
    Accumulate(x, values, map.unit(), lane);
  }

  // The step from logits x on, which become weights.
  PERFORMER_DEVICE void Accumulate(float (&x)[kRowTiles][8][4], const T* values, float unit,
                                   int lane) {
    bool grew = false;
    float factor[kRowTiles][2];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float y = row_max[m][e];
#pragma unroll
        for (int n = 0; n < 8; ++n) y = fmaxf(y, fmaxf(x[m][n][2 * e], x[m][n][2 * e + 1]));
        y = QuadMax(y);
        grew |= y > row_max[m][e];
        factor[m][e] = Exp2((row_max[m][e] - ZeroIfNone(y)) * unit);
        row_max[m][e] = y;
      }
    if (__any_sync(kAllLanes, grew))  // skipping a multiplication by 1 changes no bit
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          sum[m][e] *= factor[m][e];
#pragma unroll
          for (int n = 0; n < W / 8; ++n) {
            acc[m][n][2 * e] *= factor[m][e];
            acc[m][n][2 * e + 1] *= factor[m][e];
          }
        }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float base = ZeroIfNone(row_max[m][e]);
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& y = x[m][n][2 * e + c];
            y = Exp2((y - base) * unit);
            sum[m][e] += y;
          }
      }
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      uint32_t a[kRowTiles][kFragment<T>];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) PackA<T>(a[m], x[m][2 * s], x[m][2 * s + 1]);
#pragma unroll
      for (int n = 0; n < W / 16; ++n) {
        uint32_t b[kFragment<T>];
        LoadBTrans<T, W>(b, values, s * 16, n * 16, lane);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) Mma<T>(acc[m][2 * n], acc[m][2 * n + 1], a[m], b);
      }
    }
  }

  // 1 / sum of a row, 0 where it saw nothing; `total` is the sum itself.
  PERFORMER_DEVICE float Inverse(int m, int e, float* total) const {
    *total = QuadSum(sum[m][e]);
    return *total == 0.f ? 0.f : 1.f / *total;
  }

  // x += rows columns^T.
  template <class Rows>
  PERFORMER_DEVICE static void AddProducts(Rows rows, const T* columns, int lane,
                                           float (&x)[kRowTiles][8][4]) {
#pragma unroll
    for (int s = 0; s < W / 16; ++s) {
      uint32_t a[kRowTiles][kFragment<T>];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) rows(a[m], m, s);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t b[kFragment<T>];
        LoadB<T, W>(b, columns, n * 16, s * 16, lane);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) Mma<T>(x[m][2 * n], x[m][2 * n + 1], a[m], b);
      }
    }
  }

 private:
  template <class Rows>
  PERFORMER_DEVICE static void Logits(Rows rows, const T* columns, const float* bias,
                                      const Map& map, int lane, float (&x)[kRowTiles][8][4]) {
    const int t = lane & 3;
    const bool linear = map.linear();
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float b0 = linear ? bias[n * 8 + 2 * t] : 0.f;
      const float b1 = linear ? bias[n * 8 + 2 * t + 1] : 0.f;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
        x[m][n][0] = x[m][n][2] = b0, x[m][n][1] = x[m][n][3] = b1;
    }
    AddProducts(rows, columns, lane, x);
    if (linear) return;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) MapLogits(x[m], map, bias, t);
  }
};

}  // namespace cuda
}  // namespace performer
