// Vectors of float or double, with the compiler's vector extensions: one source serves x86-64-v2,
// v3, v4 and aarch64.
#pragma once
#include <cstdint>

#include "core/inline.h"
#include "cpu/isa.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define PERFORMER_UNROLL _Pragma("GCC unroll 16")

PERFORMER_ISA_BEGIN

#if defined(__AVX512F__)
// 24 accumulators + 4 + 1 of 32 registers.
constexpr int kVectorBytes = 64, kTileRows = 6, kTileVecs = 4;
#elif defined(__AVX__)
// 12 accumulators + 2 + 1 of 16 registers.
constexpr int kVectorBytes = 32, kTileRows = 6, kTileVecs = 2;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTileRows = 6, kTileVecs = 4;
#else
constexpr int kVectorBytes = 16, kTileRows = 6, kTileVecs = 2;
#endif

template <class T>
struct VectorTypes;
template <>
struct VectorTypes<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef float Loose __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct VectorTypes<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef double Loose __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
template <class T>
using Vec = typename VectorTypes<T>::V;
template <class T>
using IntVec = typename VectorTypes<T>::I;  // also the type of a comparison: all ones where true
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
PERFORMER_INLINE Vec<T> Load(const T* p) {
  return *reinterpret_cast<const typename VectorTypes<T>::Loose*>(p);
}
template <class T>
PERFORMER_INLINE void Store(T* p, Vec<T> x) {
  *reinterpret_cast<typename VectorTypes<T>::Loose*>(p) = x;
}
template <class T>
PERFORMER_INLINE Vec<T> Splat(T x) {
  return x - Vec<T>{};  // x - 0, not x + 0: keeps -0 and compiles to one broadcast
}
PERFORMER_INLINE Vec<float> MultiplyAdd(Vec<float> a, Vec<float> b, Vec<float> c) {
  return a * b + c;
}
PERFORMER_INLINE Vec<double> MultiplyAdd(Vec<double> a, Vec<double> b, Vec<double> c) {
  return a * b + c;
}

// Two bfloat16 that are neighbours along the summed index of a product; the first is the low half.
struct Pair {
  uint32_t bits;
};
#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
PERFORMER_INLINE __m512bh Load(const Pair* p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}
PERFORMER_INLINE __m512bh Splat(Pair x) {
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x.bits)));
}
// c + a0 b0 + a1 b1
PERFORMER_INLINE Vec<float> MultiplyAdd(__m512bh a, __m512bh b, Vec<float> c) {
  return _mm512_dpbf16_ps(c, a, b);
}
#else
constexpr bool kHasPairs = false;
#endif

// Elementwise a > b ? a : b. Where a is NaN the result is b: Max(x, highest) ignores a NaN in x.
template <class V>
PERFORMER_INLINE V Max(V a, V b) {
  return a > b ? a : b;
}

// Folds the halves of a vector together until one lane is left: a tree, in a fixed order.
template <class T, class Fold>
PERFORMER_INLINE T Reduce(Vec<T> x, Fold fold) {
  T lane[kLanes<T>];
  Store(lane, x);
  PERFORMER_UNROLL
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = fold(lane[i], lane[i + half]);
  return lane[0];
}
template <class T>
PERFORMER_INLINE T ReduceAdd(Vec<T> x) {
  return Reduce<T>(x, [](T a, T b) { return a + b; });
}
template <class T>
PERFORMER_INLINE T ReduceMax(Vec<T> x) {
  return Reduce<T>(x, [](T a, T b) { return a > b ? a : b; });
}
#if defined(__AVX__)
// The same trees, in registers.
#define PERFORMER_SHUFFLE __builtin_shufflevector
template <class Fold>
PERFORMER_INLINE float ReduceFloat(Vec<float> x, Fold fold) {
#if defined(__AVX512F__)
  x = fold(x, PERFORMER_SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = fold(x, PERFORMER_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  x = fold(x, PERFORMER_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  x = fold(x, PERFORMER_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#else
  x = fold(x, PERFORMER_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
  x = fold(x, PERFORMER_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
  x = fold(x, PERFORMER_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6));
#endif
  return x[0];
}
template <>
PERFORMER_INLINE float ReduceAdd<float>(Vec<float> x) {
  return ReduceFloat(x, [](Vec<float> a, Vec<float> b) { return a + b; });
}
template <>
PERFORMER_INLINE float ReduceMax<float>(Vec<float> x) {
  return ReduceFloat(x, [](Vec<float> a, Vec<float> b) { return Max(a, b); });
}
#undef PERFORMER_SHUFFLE
#endif

// dst[c][r] = src[r][c], in blocks of 4 x 4 on every target; rows and cols are multiples of 4.
template <class T>
PERFORMER_INLINE void Transpose(const T* src, int64_t src_stride, int64_t rows, int64_t cols,
                                T* dst, int64_t dst_stride) {
  typedef T Quad __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
  const auto load = [](const T* p) { return *reinterpret_cast<const Quad*>(p); };
  const auto store = [](T* p, Quad x) { *reinterpret_cast<Quad*>(p) = x; };
  for (int64_t c = 0; c < cols; c += 4)
    for (int64_t r = 0; r < rows; r += 4) {
      const T* s = src + r * src_stride + c;
      const Quad a0 = load(s), a1 = load(s + src_stride), a2 = load(s + 2 * src_stride),
                 a3 = load(s + 3 * src_stride);
      const Quad l0 = __builtin_shufflevector(a0, a1, 0, 4, 1, 5),
                 h0 = __builtin_shufflevector(a0, a1, 2, 6, 3, 7);
      const Quad l1 = __builtin_shufflevector(a2, a3, 0, 4, 1, 5),
                 h1 = __builtin_shufflevector(a2, a3, 2, 6, 3, 7);
      T* d = dst + c * dst_stride + r;
      store(d, __builtin_shufflevector(l0, l1, 0, 1, 4, 5));
      store(d + dst_stride, __builtin_shufflevector(l0, l1, 2, 3, 6, 7));
      store(d + 2 * dst_stride, __builtin_shufflevector(h0, h1, 0, 1, 4, 5));
      store(d + 3 * dst_stride, __builtin_shufflevector(h0, h1, 2, 3, 6, 7));
    }
}
PERFORMER_INLINE void Transpose(const Pair* src, int64_t src_stride, int64_t rows, int64_t cols,
                                Pair* dst, int64_t dst_stride) {
  Transpose(reinterpret_cast<const float*>(src), src_stride, rows, cols,
            reinterpret_cast<float*>(dst), dst_stride);
}

PERFORMER_ISA_END
