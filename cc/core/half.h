// bfloat16 and half, and their conversions. Always inlined: files of several instruction sets
// include it.
#pragma once
#include <cstdint>

#include "core/inline.h"

namespace performer {

// 16-bit numbers in memory. Arithmetic is in float32.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

PERFORMER_INLINE uint32_t BitsOf(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
PERFORMER_INLINE float FromBits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// The number in the type of the arithmetic, exactly.
PERFORMER_INLINE float Widen(float x) { return x; }
PERFORMER_INLINE double Widen(double x) { return x; }
PERFORMER_INLINE float Widen(BFloat16 x) { return FromBits(static_cast<uint32_t>(x.bits) << 16); }
PERFORMER_INLINE float Widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  // The product rebiases the exponent by 127 - 15 and normalises subnormals.
  const uint32_t finite = BitsOf(FromBits(rest << 13) * 0x1p112f);
  return FromBits(sign | (rest >= 0x7c00 ? (rest << 13) | 0x7f800000 : finite));
}

// The number in the type of a tensor, rounded to nearest even. NaN becomes a quiet NaN of its sign.
PERFORMER_INLINE void Narrow(float x, float* to) { *to = x; }
PERFORMER_INLINE void Narrow(double x, double* to) { *to = x; }
PERFORMER_INLINE void Narrow(float x, BFloat16* to) {
  const uint32_t bits = BitsOf(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 64 : rounded);
}
PERFORMER_INLINE void Narrow(float x, Half* to) {
  const uint32_t bits = BitsOf(x), rest = bits & 0x7fffffff;
  const uint32_t special = rest > 0x7f800000 ? 0x7e00u : 0x7c00u;
  // The sum rounds at the last place of a half.
  const uint32_t subnormal = BitsOf(FromBits(rest) + 0.5f) - BitsOf(0.5f);
  // Rebiases the exponent by 15 - 127 and rounds.
  const uint32_t normal = (rest + 0xc8000fffu + ((rest >> 13) & 1)) >> 13;
  const uint32_t magnitude = rest >= 0x47800000 ? special : rest < 0x38800000 ? subnormal : normal;
  to->bits = static_cast<uint16_t>(((bits >> 16) & 0x8000) | magnitude);
}

}  // namespace performer
