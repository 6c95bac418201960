// Tiles in shared memory, and the operands of products that are read from them. The functions are
// the same for bfloat16 and half (one mma.m16n8k16) and for float32 (three mma.m16n8k8 of tf32
// parts, which keep float32's accuracy).
//
// A tile is [rows][W], W = 64, 128 or, in 16 bits only, 256. Chunks of 16 bytes are permuted within a
// row (XOR with a function of the row), so that operand loads, cp.async and stores of accumulators
// are free of bank conflicts without padding.
//
// Fragments: g = lane / 4, t = lane % 4. An accumulator c[4] of 16 rows x 8 columns holds (row g,
// columns 2t and 2t + 1), then row g + 8, the same columns. Operands cover 16 of the summed index:
//
//   A   16 rows
//   B   16 columns, which make two accumulators side by side
//
// A product's accumulators, two side by side, are the A operand of a product that sums over these
// 16 columns (PackA). For float32 that holds because both operands number the summed index alike:
// within 8, position t is number 2t and position t + 4 is number 2t + 1.
#pragma once
#include "cuda/device/ptx.h"

namespace performer {
namespace cuda {

inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
inline constexpr float kInfinity = __builtin_huge_valf();
inline constexpr uint32_t kAllLanes = 0xffffffffu;

template <class T>
inline constexpr bool kIs16Bit = sizeof(T) == 2;
template <class T>
inline constexpr int kChunk = 16 / sizeof(T);  // numbers in 16 bytes
template <class T>
inline constexpr int kFragment = kIs16Bit<T> ? 4 : 8;  // registers of an operand

// How many iterations over the summed index are unrolled. In float32, whose iterations are long,
// none are, so that operands of several iterations do not wait in registers.
template <class T>
inline constexpr int kUnroll = kIs16Bit<T> ? 8 : 1;

// Of gradients, which are sums of W columns, registers hold at most 128: a block has a slice of
// them. The blocks of the other slices compute the same weights.
template <int W>
inline constexpr int kSlice = W < 128 ? W : 128;
template <int W>
inline constexpr int kSlices = W / kSlice<W>;
// The first column of a block, from an index of the grid that counts slices first.
template <int W>
PERFORMER_DEVICE int SliceBegin(unsigned index) {
  return kSlices<W> == 1 ? 0 : static_cast<int>(index % kSlices<W>) * kSlice<W>;
}

// The index of (row, column) in a tile.
template <class T, int W>
PERFORMER_DEVICE int At(int row, int column) {
  constexpr int kLog = kIs16Bit<T> ? 3 : 2;
  const int chunk = column >> kLog;
  // 16-bit: 8 rows of one chunk (ldmatrix). float32: 4 neighbouring rows, or every second of 8
  // rows, of two chunks.
  const int swap = kIs16Bit<T> ? row & 7 : (row & 2) | (((row ^ row >> 2) & 1) << 2);
  return row * W + ((chunk ^ swap) << kLog) + (column & (kChunk<T> - 1));
}

// At<T, W>(row, 8 n + 2 t), t < 4, in less arithmetic. Eight rows further, in the same 16, it is
// 8 W larger.
template <class T, int W>
PERFORMER_DEVICE int AtPair(int row, int n, int t) {
  if constexpr (kIs16Bit<T>)
    return row * W + ((n ^ (row & 7)) << 3) + 2 * t;
  else
    return At<T, W>(row, n * 8 + 2 * t);
}

template <class T>
PERFORMER_DEVICE uint32_t* Pair(T* p) {
  return reinterpret_cast<uint32_t*>(p);
}
template <class T>
PERFORMER_DEVICE const uint32_t* Pair(const T* p) {
  return reinterpret_cast<const uint32_t*>(p);
}

// Stores two neighbouring numbers, the first in an even column.
template <class T>
PERFORMER_DEVICE void StorePair(T* p, float x, float y) {
  *Pair(p) = Pack<T>(x, y);
}
template <>
PERFORMER_DEVICE void StorePair<float>(float* p, float x, float y) {
  *reinterpret_cast<float2*>(p) = float2{x, y};
}
template <class T>
PERFORMER_DEVICE float2 LoadPair(const T* p) {
  const uint32_t pair = *Pair(p);
  return float2{Low<T>(pair), High<T>(pair)};
}
template <>
PERFORMER_DEVICE float2 LoadPair<float>(const float* p) {
  return *reinterpret_cast<const float2*>(p);
}

// Sets a tile of accumulators to the same row of numbers everywhere, of which `from` points to
// those of this lane's first two columns, factor times.
template <int kTiles>
PERFORMER_DEVICE void SetRows(float (&x)[kTiles][4], const float* from, float factor = 1.f) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float2 pair = LoadPair(from + n * 8);
    x[n][0] = x[n][2] = factor * pair.x;
    x[n][1] = x[n][3] = factor * pair.y;
  }
}
template <int kTiles>
PERFORMER_DEVICE void SetZero(float (&x)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) x[n][i] = 0.f;
}

// Writes columns `column` (even) and column + 1 of a row in global memory, those below `width`.
template <class T>
PERFORMER_DEVICE void StoreColumns(T* row, int column, int width, bool aligned, float x, float y) {
  if (aligned) {
    if (column < width) StorePair(row + column, x, y);
  } else {
    if (column < width) row[column] = FromFloat<T>(x);
    if (column + 1 < width) row[column + 1] = FromFloat<T>(y);
  }
}

// A operand: rows r0 .. r0 + 15, summed index k0 .. k0 + 15, from a tile [row][k].
template <class T, int W>
PERFORMER_DEVICE void LoadA(uint32_t (&a)[kFragment<T>], const T* tile, int r0, int k0, int lane) {
  if constexpr (kIs16Bit<T>) {
    LdMatrixX4(a, tile + At<T, W>(r0 + (lane & 15), k0 + 8 * (lane >> 4)));
  } else {
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float2 x =
            LoadPair(tile + At<T, W>(r0 + lane / 4 + 8 * e, k0 + 8 * s + 2 * (lane & 3)));
        a[4 * s + e] = AsBits(x.x);
        a[4 * s + 2 + e] = AsBits(x.y);
      }
  }
}
// The same from a tile [k][row].
template <class T, int W>
PERFORMER_DEVICE void LoadATrans(uint32_t (&a)[kFragment<T>], const T* tile, int r0, int k0,
                                 int lane) {
  if constexpr (kIs16Bit<T>) {
    LdMatrixX4Trans(a, tile + At<T, W>(k0 + (lane & 7) + 8 * (lane >> 4), r0 + (lane & 8)));
  } else {
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          a[4 * s + 2 * k + e] =
              AsBits(tile[At<T, W>(k0 + 8 * s + 2 * (lane & 3) + k, r0 + lane / 4 + 8 * e)]);
  }
}
// B operand: columns n0 .. n0 + 15 from a tile [n][k].
template <class T, int W>
PERFORMER_DEVICE void LoadB(uint32_t (&b)[kFragment<T>], const T* tile, int n0, int k0, int lane) {
  if constexpr (kIs16Bit<T>) {
    LdMatrixX4(b, tile + At<T, W>(n0 + (lane & 7) + 8 * (lane >> 4), k0 + (lane & 8)));
  } else {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const float2 x =
            LoadPair(tile + At<T, W>(n0 + 8 * h + lane / 4, k0 + 8 * s + 2 * (lane & 3)));
        b[4 * h + 2 * s] = AsBits(x.x);
        b[4 * h + 2 * s + 1] = AsBits(x.y);
      }
  }
}
// The same from a tile [k][n].
template <class T, int W>
PERFORMER_DEVICE void LoadBTrans(uint32_t (&b)[kFragment<T>], const T* tile, int k0, int n0,
                                 int lane) {
  if constexpr (kIs16Bit<T>) {
    LdMatrixX4Trans(b, tile + At<T, W>(k0 + (lane & 15), n0 + 8 * (lane >> 4)));
  } else {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int k = 0; k < 2; ++k)
          b[4 * h + 2 * s + k] =
              AsBits(tile[At<T, W>(k0 + 8 * s + 2 * (lane & 3) + k, n0 + 8 * h + lane / 4)]);
  }
}

// x = high + low, both tf32, with an error of at most 2^-22 |x|.
struct Tf32Parts {
  uint32_t high, low;
};
PERFORMER_DEVICE Tf32Parts Split(uint32_t bits) {
  const float x = AsFloat(bits);
  const uint32_t high = ToTf32(x);
  return {high, ToTf32(x - AsFloat(high))};
}

// c += a b, 8 of the summed index, as three products of tf32 parts, the small ones first. They are
// summed apart: tensor cores cut off what an accumulator cannot hold, always toward zero, so that a
// long sum would drift away from float32's. The addition rounds to nearest (arXiv:2203.03341).
PERFORMER_DEVICE void MmaTf32Parts(float (&c)[4], const uint32_t (&high)[4],
                                   const uint32_t (&low)[4], uint32_t b0, uint32_t b1) {
  const Tf32Parts x = Split(b0), y = Split(b1);
  float sum[4] = {};
  MmaTf32M16N8K8(sum, low, x.high, y.high);
  MmaTf32M16N8K8(sum, high, x.low, y.low);
  MmaTf32M16N8K8(sum, high, x.high, y.high);
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += sum[i];
}

// Two accumulators side by side += A B.
template <class T>
PERFORMER_DEVICE void Mma(float (&c0)[4], float (&c1)[4], const uint32_t (&a)[kFragment<T>],
                          const uint32_t (&b)[kFragment<T>]) {
  if constexpr (kIs16Bit<T>) {
    MmaM16N8K16<T>(c0, a, b[0], b[1]);
    MmaM16N8K16<T>(c1, a, b[2], b[3]);
  } else {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t high[4], low[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Tf32Parts parts = Split(a[4 * s + i]);
        high[i] = parts.high;
        low[i] = parts.low;
      }
      MmaTf32Parts(c0, high, low, b[2 * s], b[2 * s + 1]);
      MmaTf32Parts(c1, high, low, b[4 + 2 * s], b[4 + 2 * s + 1]);
    }
  }
}

// Two accumulators side by side as an A operand, rounded to T.
template <class T>
PERFORMER_DEVICE void PackA(uint32_t (&a)[kFragment<T>], const float (&c0)[4],
                            const float (&c1)[4]) {
  if constexpr (kIs16Bit<T>) {
    a[0] = Pack<T>(c0[0], c0[1]);
    a[1] = Pack<T>(c0[2], c0[3]);
    a[2] = Pack<T>(c1[0], c1[1]);
    a[3] = Pack<T>(c1[2], c1[3]);
  } else {
    a[0] = AsBits(c0[0]), a[1] = AsBits(c0[2]), a[2] = AsBits(c0[1]), a[3] = AsBits(c0[3]);
    a[4] = AsBits(c1[0]), a[5] = AsBits(c1[2]), a[6] = AsBits(c1[1]), a[7] = AsBits(c1[3]);
  }
}

// What PackA rounded off, for 16 bits: the operand whose sum with `a` is nearly float32.
template <class T>
PERFORMER_DEVICE void PackRest(uint32_t (&rest)[4], const uint32_t (&a)[4], const float (&c0)[4],
                               const float (&c1)[4]) {
  rest[0] = Pack<T>(c0[0] - Low<T>(a[0]), c0[1] - High<T>(a[0]));
  rest[1] = Pack<T>(c0[2] - Low<T>(a[1]), c0[3] - High<T>(a[1]));
  rest[2] = Pack<T>(c1[0] - Low<T>(a[2]), c1[1] - High<T>(a[2]));
  rest[3] = Pack<T>(c1[2] - Low<T>(a[3]), c1[3] - High<T>(a[3]));
}

// The sum and the largest over the 32 lanes of a warp.
PERFORMER_DEVICE float WarpSum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}
PERFORMER_DEVICE float WarpMax(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

// The sum and the largest over the four lanes that hold one row of an accumulator.
PERFORMER_DEVICE float QuadSum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
PERFORMER_DEVICE float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// What is subtracted in an exponent: the maximum, or 0 where nothing was summed.
PERFORMER_DEVICE float ZeroIfNone(float row_max) { return row_max == -kInfinity ? 0.f : row_max; }

}  // namespace cuda
}  // namespace performer
