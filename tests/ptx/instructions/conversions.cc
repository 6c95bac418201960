// Conversions among types.
#include <cmath>
#include <limits>

#include "ptx/instructions/table.h"

namespace performer {
namespace ptx {
namespace {

template <class T>
uint16_t Narrowed(float x) {
  T narrow;
  Narrow(x, &narrow);
  return std::isnan(x) ? uint16_t{0x7fff} : narrow.bits;  // the one NaN of cvt
}
uint32_t ToTf32(float x) {
  const uint32_t bits = BitsOf(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}
// Cut off, within the limits of T; NaN is 0.
template <class T>
T CutOff(float x) {
  const double y = std::trunc(static_cast<double>(x));
  if (std::isnan(y)) return 0;
  if (y <= static_cast<double>(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (y >= static_cast<double>(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return static_cast<T>(y);
}

template <class To, class From>
void DefineConversion(Table& t, const std::string& to, const std::string& from) {
  const std::string opcode = "cvt." + to + "." + from;
  Define<To, From>(t, opcode, [](From x) { return static_cast<To>(x); });
  if constexpr (sizeof(From) < 8)
    Define<To, uint64_t>(t, OfWide(opcode),
                         [](uint64_t x) { return static_cast<To>(static_cast<From>(x)); });
}
template <class From>
void DefineConversionsOf(Table& t, const std::string& from) {
  DefineConversion<int8_t, From>(t, "s8", from);
  DefineConversion<uint8_t, From>(t, "u8", from);
  DefineConversion<int16_t, From>(t, "s16", from);
  DefineConversion<uint16_t, From>(t, "u16", from);
  DefineConversion<int32_t, From>(t, "s32", from);
  DefineConversion<uint32_t, From>(t, "u32", from);
  DefineConversion<int64_t, From>(t, "s64", from);
  DefineConversion<uint64_t, From>(t, "u64", from);
  Define<float, From>(t, "cvt.rn.f32." + from, [](From x) { return static_cast<float>(x); });
}

}  // namespace

void DefineConversions(Table& t) {
  DefineConversionsOf<int16_t>(t, "s16");
  DefineConversionsOf<uint16_t>(t, "u16");
  DefineConversionsOf<int32_t>(t, "s32");
  DefineConversionsOf<uint32_t>(t, "u32");
  DefineConversionsOf<int64_t>(t, "s64");
  DefineConversionsOf<uint64_t>(t, "u64");
  Define<float, float>(t, "cvt.sat.f32.f32", [](float x) {
    return x >= 1 ? 1.f : x > 0 ? x : 0.f;
  });
  Define<float, float>(t, "cvt.rmi.f32.f32", [](float x) { return std::floor(x); });
  Define<float, float>(t, "cvt.rpi.f32.f32", [](float x) { return std::ceil(x); });
  Define<float, float>(t, "cvt.rzi.f32.f32", [](float x) { return std::trunc(x); });
  Define<int32_t, float>(t, "cvt.rzi.s32.f32", [](float x) { return CutOff<int32_t>(x); });
  Define<uint32_t, float>(t, "cvt.rzi.u32.f32", [](float x) { return CutOff<uint32_t>(x); });
  Define<float, uint16_t>(t, "cvt.f32.f16", [](uint16_t x) { return Widened<Half>(x); });
  Define<float, uint16_t>(t, "cvt.f32.bf16", [](uint16_t x) { return Widened<BFloat16>(x); });
  Define<uint16_t, float>(t, "cvt.rn.f16.f32", [](float x) { return Narrowed<Half>(x); });
  Define<uint16_t, float>(t, "cvt.rn.bf16.f32", [](float x) { return Narrowed<BFloat16>(x); });
  Define<uint32_t, float, float>(t, "cvt.rn.bf16x2.f32", [](float high, float low) {
    return uint32_t{Narrowed<BFloat16>(high)} << 16 | Narrowed<BFloat16>(low);
  });
  Define<uint32_t, float, float>(t, "cvt.rn.f16x2.f32", [](float high, float low) {
    return uint32_t{Narrowed<Half>(high)} << 16 | Narrowed<Half>(low);
  });
  Define<uint32_t, float>(t, "cvt.rna.tf32.f32", [](float x) { return ToTf32(x); });
}

}  // namespace ptx
}  // namespace performer
