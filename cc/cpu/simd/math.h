// 2^x and log2(x) of vectors. The kernels work in base 2.
#pragma once
#include "cpu/simd/vector.h"

PERFORMER_ISA_BEGIN

constexpr double kLog2eDouble = 1.4426950408889634, kLn2Double = 0.6931471805599453;
template <class T>
constexpr T kLog2e = static_cast<T>(kLog2eDouble);
template <class T>
constexpr T kLn2 = static_cast<T>(kLn2Double);
template <class T>
constexpr T kInf = static_cast<T>(__builtin_inf());

// Minimax polynomial of 2^r on [-1/2, 1/2], relative error 1.9e-9.
PERFORMER_INLINE Vec<float> Exp2Polynomial(Vec<float> r) {
  constexpr float kCoefficients[] = {1.0f,           0x1.62e430p-1f, 0x1.ebfbdap-3f,
                                     0x1.c6aed4p-5f, 0x1.3b2dbcp-7f, 0x1.5f456ap-10f,
                                     0x1.41d334p-13f};
  Vec<float> p = Splat(kCoefficients[6]);
  PERFORMER_UNROLL
  for (int i = 5; i >= 0; --i) p = p * r + kCoefficients[i];
  return p;
}

// 2^x. The largest error is 1.2 ulp (0.95 with FMA) on [-125.5, 127]. 2^-inf and everything below
// -150 give 0, 128 and above give inf, NaN gives NaN.
PERFORMER_INLINE Vec<float> Exp2(Vec<float> x) {
#if defined(__AVX512F__)
  const Vec<float> n = _mm512_roundscale_ps(x, 8);    // to nearest, no exceptions
  return _mm512_scalef_ps(Exp2Polynomial(x - n), n);  // for -inf, scalef(NaN, -inf) is 0
#else
  x = x < -127.0f ? Splat(-127.0f) : x;  // in this order NaN stays NaN
  x = x > 128.0f ? Splat(128.0f) : x;
  // Adding 1.5 * 2^23 moves the integer part to the low mantissa bits.
  const Vec<float> shifted = x + 12582912.0f;
  const Vec<float> p = Exp2Polynomial(x - (shifted - 12582912.0f));
  // -127 gives 0, 128 gives inf.
  const IntVec<float> scale = (reinterpret_cast<IntVec<float>>(shifted) << 23) + (127 << 23);
  return p * reinterpret_cast<Vec<float>>(scale);
#endif
}

// log2(x) for x >= 0. The largest error is 2 ulp, or 1.2e-7 near 1. 0 gives -inf, inf gives inf,
// NaN gives NaN.
PERFORMER_INLINE Vec<float> Log2(Vec<float> x) {
  const IntVec<float> tiny = x < 0x1p-126f;
  const Vec<float> y = tiny ? x * 0x1p24f : x;
  const IntVec<float> bits = reinterpret_cast<IntVec<float>>(y);
  const IntVec<float> exponent = (bits - 0x3f3504f3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  const Vec<float> m = reinterpret_cast<Vec<float>>(bits - (exponent << 23));
  const Vec<float> s = (m - 1.0f) / (m + 1.0f), t = s * s;  // log(m) = 2 atanh(s), |s| < 0.172
  const Vec<float> series =
      1.0f + t * (1.0f / 3 + t * (1.0f / 5 + t * (1.0f / 7 + t * (1.0f / 9 + t * (1.0f / 11)))));
  const Vec<float> shift = tiny ? Splat(-24.0f) : Splat(0.0f);
  const Vec<float> result =
      __builtin_convertvector(exponent, Vec<float>) + shift + s * series * (2.0f * kLog2e<float>);
  const Vec<float> special = x == 0.0f ? Splat(-kInf<float>) : x;
  return (x == 0.0f) | (x == kInf<float>) | (x != x) ? special : result;
}

// log2(1 + x) for 0 <= x <= 1. The largest error is 3 ulp, of small results too. NaN gives NaN.
PERFORMER_INLINE Vec<float> Log2OnePlus(Vec<float> x) {
  const Vec<float> s = x / (2.0f + x), t = s * s;  // log(1 + x) = 2 atanh(s), s <= 1/3
  Vec<float> series = Splat(1.0f / 15);
  PERFORMER_UNROLL
  for (int n = 13; n > 0; n -= 2) series = series * t + 1.0f / static_cast<float>(n);
  return s * series * (2.0f * kLog2e<float>);
}

// In double, lane by lane: only gradient checks run in double. The error of the C library is below
// 1 ulp.
PERFORMER_INLINE Vec<double> Exp2(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}
PERFORMER_INLINE Vec<double> Log2(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log2(x[i]);
  return x;
}
PERFORMER_INLINE Vec<double> Log2OnePlus(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = kLog2eDouble * __builtin_log1p(x[i]);
  return x;
}

// 2^x, but 0 instead of a denormal, on which processors spend a hundred cycles.
template <class T>
constexpr T kLeastExponent = sizeof(T) == sizeof(float) ? T(-126) : T(-1022);
template <class T>
PERFORMER_INLINE Vec<T> Exp2Normal(Vec<T> x) {
  return Exp2(x < kLeastExponent<T> ? Splat(-kInf<T>) : x);
}

// x, but 0 instead of a denormal.
template <class T>
constexpr T kLeastNormal = sizeof(T) == sizeof(float) ? T(0x1p-126) : T(0x1p-1022);
template <class T>
PERFORMER_INLINE Vec<T> WithoutDenormals(Vec<T> x) {
  return (x < kLeastNormal<T>)&(x > -kLeastNormal<T>) ? Vec<T>{} : x;
}

PERFORMER_INLINE float Exp2(float x) { return __builtin_exp2f(x); }
PERFORMER_INLINE double Exp2(double x) { return __builtin_exp2(x); }
PERFORMER_INLINE float Log2(float x) { return __builtin_log2f(x); }
PERFORMER_INLINE double Log2(double x) { return __builtin_log2(x); }

PERFORMER_ISA_END
