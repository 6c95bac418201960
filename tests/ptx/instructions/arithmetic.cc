// Arithmetic of integers, bits, float32 and predicates. ex2 and lg2 are those of the host.
#include <cfenv>
#include <cmath>
#include <limits>

#include "ptx/instructions/table.h"

namespace performer {
namespace ptx {
namespace {

template <class T>
void DefineIntegers(Table& t, const std::string& type) {
  using U = std::make_unsigned_t<T>;
  Define<T, T, T>(t, "add." + type, [](T x, T y) { return static_cast<T>(U(x) + U(y)); });
  Define<T, T, T>(t, "sub." + type, [](T x, T y) { return static_cast<T>(U(x) - U(y)); });
  const auto product = [](T x, T y) { return static_cast<T>(uint64_t(x) * uint64_t(y)); };
  Define<T, T, T>(t, "mul.lo." + type, product);
  Define<T, T, T, T>(t, "mad.lo." + type, [](T x, T y, T z) {
    return static_cast<T>(uint64_t(x) * uint64_t(y) + uint64_t(z));
  });
  Define<T, T, T>(t, "min." + type, [](T x, T y) { return x < y ? x : y; });
  Define<T, T, T>(t, "max." + type, [](T x, T y) { return x > y ? x : y; });
  // Where there is no quotient, PTX says nothing.
  Define<T, T, T>(t, "div." + type, [](T x, T y) {
    if (y == 0) return std::numeric_limits<T>::max();
    return std::is_signed_v<T> && y == T(-1) ? static_cast<T>(U(0) - U(x)) : static_cast<T>(x / y);
  });
  Define<T, T, T>(t, "rem." + type, [](T x, T y) {
    if (y == 0) return std::numeric_limits<T>::max();
    return std::is_signed_v<T> && y == T(-1) ? T(0) : static_cast<T>(x % y);
  });
  constexpr uint32_t kWidth = 8 * sizeof(T);
  Define<T, T, uint32_t>(t, "shr." + type, [](T x, uint32_t n) {
    if (n < kWidth) return static_cast<T>(x >> n);
    return static_cast<T>(x < T(0) ? -1 : 0);
  });
  Define<bool, T, T>(t, "setp.eq." + type, [](T x, T y) { return x == y; });
  Define<bool, T, T>(t, "setp.ne." + type, [](T x, T y) { return x != y; });
  Define<bool, T, T>(t, "setp.lt." + type, [](T x, T y) { return x < y; });
  Define<bool, T, T>(t, "setp.le." + type, [](T x, T y) { return x <= y; });
  Define<bool, T, T>(t, "setp.gt." + type, [](T x, T y) { return x > y; });
  Define<bool, T, T>(t, "setp.ge." + type, [](T x, T y) { return x >= y; });
  if constexpr (std::is_signed_v<T>) {
    Define<T, T>(t, "neg." + type, [](T x) { return static_cast<T>(U(0) - U(x)); });
    Define<T, T>(t, "abs." + type, [](T x) { return x < 0 ? static_cast<T>(U(0) - U(x)) : x; });
  }
}

// T by T, of twice the width.
template <class T, class Wide>
void DefineWide(Table& t, const std::string& type) {
  const auto product = [](T x, T y) { return static_cast<Wide>(Wide(x) * Wide(y)); };
  Define<Wide, T, T>(t, "mul.wide." + type, product);
  Define<Wide, T, T, Wide>(t, "mad.wide." + type, [](T x, T y, Wide z) {
    return static_cast<Wide>(uint64_t(Wide(x) * Wide(y)) + uint64_t(z));
  });
  Define<T, T, T>(t, "mul.hi." + type,
                  [](T x, T y) { return static_cast<T>((Wide(x) * Wide(y)) >> (8 * sizeof(T))); });
}

template <class T>
void DefineBits(Table& t, const std::string& width) {
  Define<T, T, T>(t, "and.b" + width, [](T x, T y) { return static_cast<T>(x & y); });
  Define<T, T, T>(t, "or.b" + width, [](T x, T y) { return static_cast<T>(x | y); });
  Define<T, T, T>(t, "xor.b" + width, [](T x, T y) { return static_cast<T>(x ^ y); });
  Define<T, T>(t, "not.b" + width, [](T x) { return static_cast<T>(~x); });
  constexpr uint32_t kWidth = 8 * sizeof(T);
  const auto left = [](T x, uint32_t n) { return static_cast<T>(n < kWidth ? x << n : 0); };
  const auto right = [](T x, uint32_t n) { return static_cast<T>(n < kWidth ? x >> n : 0); };
  Define<T, T, uint32_t>(t, "shl.b" + width, left);
  Define<T, T, uint32_t>(t, "shr.b" + width, right);
  for (const char* type : {"b", "u", "s"}) {
    Define<T, T>(t, std::string("mov.") + type + width, [](T x) { return x; });
    Define<T, T, T, bool>(t, std::string("selp.") + type + width,
                          [](T x, T y, bool first) { return first ? x : y; });
  }
  for (const char* name : {"setp.eq.b", "setp.ne.b"}) {
    const bool equal = std::string(name) == "setp.eq.b";
    if (equal) Define<bool, T, T>(t, name + width, [](T x, T y) { return x == y; });
    if (!equal) Define<bool, T, T>(t, name + width, [](T x, T y) { return x != y; });
  }
}

// bfi and bfe, of 32 or 64 bits.
template <class T>
void DefineFields(Table& t, const std::string& width) {
  // Bits from `position` on, as many as `count`.
  const auto mask = [](uint32_t position, uint32_t count) {
    position &= 0xff, count &= 0xff;
    T bits = count >= 8 * sizeof(T) ? ~T(0) : static_cast<T>((T(1) << count) - 1);
    return position >= 8 * sizeof(T) ? T(0) : static_cast<T>(bits << position);
  };
  Define<T, T, T, uint32_t, uint32_t>(
      t, "bfi.b" + width, [=](T x, T y, uint32_t position, uint32_t count) {
        const T field = mask(position, count), p = position & 0xff;
        return static_cast<T>((y & ~field) | ((p < 8 * sizeof(T) ? x << p : 0) & field));
      });
  Define<T, T, uint32_t, uint32_t>(t, "bfe.u" + width, [=](T x, uint32_t position, uint32_t count) {
    const uint32_t p = position & 0xff;
    if (p >= 8 * sizeof(T)) return T(0);
    return static_cast<T>((x >> p) & mask(0, count));
  });
}

float Max(float x, float y) {
  if (std::isnan(x) || std::isnan(y))
    return std::isnan(x) ? (std::isnan(y) ? FromBits(0x7fffffff) : y) : x;
  if (x == y) return std::signbit(x) ? y : x;  // of zeros, +0
  return x > y ? x : y;
}

// x * y + z, rounded down. (The compiler knows nothing of directions: volatile keeps the order.)
float FusedDown(float x, float y, float z) {
  volatile float factor = x, result;
  const int before = std::fegetround();
  std::fesetround(FE_DOWNWARD);
  result = std::fma(factor, y, z);
  std::fesetround(before);
  return result;
}

void DefineFloats(Table& t) {
  using F = float;
  for (const char* round : {"", ".rn"}) {
    Define<F, F, F>(t, std::string("add") + round + ".f32", [](F x, F y) { return x + y; });
    Define<F, F, F>(t, std::string("sub") + round + ".f32", [](F x, F y) { return x - y; });
    Define<F, F, F>(t, std::string("mul") + round + ".f32", [](F x, F y) { return x * y; });
  }
  Define<F, F, F>(t, "div.rn.f32", [](F x, F y) { return x / y; });
  Define<F, F>(t, "rcp.rn.f32", [](F x) { return 1.f / x; });
  Define<F, F>(t, "sqrt.rn.f32", [](F x) { return std::sqrt(x); });
  Define<F, F, F, F>(t, "fma.rn.f32", [](F x, F y, F z) {
    return TheOptions().fused ? std::fma(x, y, z) : x * y + z;
  });
  Define<F, F, F, F>(t, "fma.rm.f32", [](F x, F y, F z) { return FusedDown(x, y, z); });
  Define<F, F, F>(t, "max.f32", [](F x, F y) { return Max(x, y); });
  Define<F, F, F>(t, "min.f32", [](F x, F y) { return -Max(-x, -y); });
  Define<F, F>(t, "neg.f32", [](F x) { return -x; });
  Define<F, F>(t, "abs.f32", [](F x) { return std::fabs(x); });
  Define<F, F>(t, "mov.f32", [](F x) { return x; });
  Define<F, F, F, bool>(t, "selp.f32", [](F x, F y, bool first) { return first ? x : y; });
  // Subnormal arguments and results are zeros of their sign.
  const auto flushed = [](F x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; };
  Define<F, F>(t, "ex2.approx.ftz.f32", [=](F x) { return flushed(std::exp2(flushed(x))); });
  Define<F, F>(t, "lg2.approx.ftz.f32", [=](F x) { return std::log2(flushed(x)); });
  Define<F, F>(t, "ex2.approx.f32", [](F x) { return std::exp2(x); });
  Define<F, F>(t, "lg2.approx.f32", [](F x) { return std::log2(x); });
  Define<bool, F, F>(t, "setp.eq.f32", [](F x, F y) { return x == y; });
  Define<bool, F, F>(t, "setp.ne.f32", [](F x, F y) { return x < y || x > y; });
  Define<bool, F, F>(t, "setp.lt.f32", [](F x, F y) { return x < y; });
  Define<bool, F, F>(t, "setp.le.f32", [](F x, F y) { return x <= y; });
  Define<bool, F, F>(t, "setp.gt.f32", [](F x, F y) { return x > y; });
  Define<bool, F, F>(t, "setp.ge.f32", [](F x, F y) { return x >= y; });
  // True of NaN.
  Define<bool, F, F>(t, "setp.equ.f32", [](F x, F y) { return !(x < y || x > y); });
  Define<bool, F, F>(t, "setp.neu.f32", [](F x, F y) { return x != y; });
  Define<bool, F, F>(t, "setp.ltu.f32", [](F x, F y) { return !(x >= y); });
  Define<bool, F, F>(t, "setp.leu.f32", [](F x, F y) { return !(x > y); });
  Define<bool, F, F>(t, "setp.gtu.f32", [](F x, F y) { return !(x <= y); });
  Define<bool, F, F>(t, "setp.geu.f32", [](F x, F y) { return !(x < y); });
  Define<bool, F, F>(t, "setp.num.f32", [](F x, F y) { return x == x && y == y; });
  Define<bool, F, F>(t, "setp.nan.f32", [](F x, F y) { return x != x || y != y; });
}

void DefinePredicates(Table& t) {
  Define<bool, bool, bool>(t, "and.pred", [](bool x, bool y) { return x && y; });
  Define<bool, bool, bool>(t, "or.pred", [](bool x, bool y) { return x || y; });
  Define<bool, bool, bool>(t, "xor.pred", [](bool x, bool y) { return x != y; });
  Define<bool, bool>(t, "not.pred", [](bool x) { return !x; });
  Define<bool, bool>(t, "mov.pred", [](bool x) { return x; });
}

uint32_t Permuted(uint32_t low, uint32_t high, uint32_t selection) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selection >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7))) & 0xff;
    if ((nibble & 8) != 0) byte = (byte & 0x80) != 0 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}

}  // namespace

void DefineArithmetic(Table& t) {
  DefineIntegers<int16_t>(t, "s16");
  DefineIntegers<uint16_t>(t, "u16");
  DefineIntegers<int32_t>(t, "s32");
  DefineIntegers<uint32_t>(t, "u32");
  DefineIntegers<int64_t>(t, "s64");
  DefineIntegers<uint64_t>(t, "u64");
  DefineWide<int16_t, int32_t>(t, "s16");
  DefineWide<uint16_t, uint32_t>(t, "u16");
  DefineWide<int32_t, int64_t>(t, "s32");
  DefineWide<uint32_t, uint64_t>(t, "u32");
  DefineBits<uint16_t>(t, "16");
  DefineBits<uint32_t>(t, "32");
  DefineBits<uint64_t>(t, "64");
  DefineFields<uint32_t>(t, "32");
  DefineFields<uint64_t>(t, "64");
  Define<uint32_t, uint32_t, uint32_t, uint32_t>(
      t, "prmt.b32", [](uint32_t low, uint32_t high, uint32_t selection) {
        return Permuted(low, high, selection);
      });
  DefineFloats(t);
  DefinePredicates(t);
}

}  // namespace ptx
}  // namespace performer
