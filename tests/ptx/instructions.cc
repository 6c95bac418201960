// What each instruction does. Semantics are those of the PTX ISA. Where it leaves open how tensor
// cores add, they do as sim/tensor_cores.h; ex2 and lg2 are those of the host.
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "core/half.h"
#include "ptx/machine.h"

namespace performer {
namespace ptx {
namespace {

// ---- Values of lanes

// Values of up to 32 bits lie in words, whose upper bits count for nothing.
template <class T>
using Stored = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T>
T FromStored(Stored<T> bits) {
  if constexpr (std::is_floating_point_v<T>) {
    T x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  } else {
    return static_cast<T>(bits);
  }
}
template <class T>
Stored<T> ToStored(T x) {
  if constexpr (std::is_floating_point_v<T>) {
    Stored<T> bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
  } else {
    return static_cast<Stored<T>>(x);
  }
}
template <class T>
Stored<T>* StoredAt(Warp& warp, Place place) {
  if constexpr (sizeof(T) == 8) {
    return warp.Doubles(place);
  } else {
    return warp.Words(place);
  }
}
template <class T>
T Get(Warp& warp, Place place, int lane) {
  if constexpr (std::is_same_v<T, bool>) {
    return (*warp.Words(place) >> lane & 1) != 0;
  } else {
    return FromStored<T>(StoredAt<T>(warp, place)[lane]);
  }
}
template <class T>
void Set(Warp& warp, Place place, int lane, T x) {
  StoredAt<T>(warp, place)[lane] = ToStored(x);
}
bool Has(uint32_t lanes, int lane) { return (lanes >> lane & 1) != 0; }
void SetPredicate(Warp& warp, Place place, uint32_t lanes, uint32_t value) {
  uint32_t& word = *warp.Words(place);
  word = (word & ~lanes) | (value & lanes);
}

template <class T>
constexpr int kBits = std::is_same_v<T, bool> ? 1
                      : sizeof(T) == 1        ? 16
                                              : 8 * sizeof(T);

// ---- The table

struct Form {
  std::vector<int> bits;  // of the operands: the result, then the others
  Action act = nullptr;
  void (*build)(const std::vector<std::string>& texts, Operands&, Instruction*) = nullptr;
};
using Table = std::map<std::string, Form>;

// The action that sets the first operand to function(others...), lane by lane.
template <class F, class To, class... From>
struct Lanewise {
  static inline const F* function = nullptr;

  template <size_t... I>
  static To At(Warp& warp, const Instruction& i, int lane, std::index_sequence<I...>) {
    return (*function)(Get<From>(warp, i.operands[I + 1], lane)...);
  }
  static void Act(Warp& warp, const Instruction& i, uint32_t lanes) {
    constexpr auto kIndices = std::index_sequence_for<From...>();
    if constexpr (std::is_same_v<To, bool>) {
      uint32_t result = 0;
      for (int lane = 0; lane < kLanes; ++lane)
        result |= static_cast<uint32_t>(At(warp, i, lane, kIndices)) << lane;
      SetPredicate(warp, i.operands[0], lanes, result);
    } else if (lanes == kAll) {
      Stored<To>* const to = StoredAt<To>(warp, i.operands[0]);
      for (int lane = 0; lane < kLanes; ++lane)
        to[lane] = ToStored<To>(At(warp, i, lane, kIndices));
    } else {
      for (int lane = 0; lane < kLanes; ++lane)
        if (Has(lanes, lane)) Set<To>(warp, i.operands[0], lane, At(warp, i, lane, kIndices));
    }
  }
};

template <class To, class... From, class F>
void Define(Table& table, const std::string& name, F function) {
  static_assert(std::is_class_v<F>, "pointers to different functions have one type");
  Lanewise<F, To, From...>::function = new F(function);  // for the life of the table
  table[name] = {{kBits<To>, kBits<From>...}, Lanewise<F, To, From...>::Act};
}

// ---- Arithmetic

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

// ---- Conversions

template <class T>
uint16_t Narrowed(float x) {
  T narrow;
  Narrow(x, &narrow);
  return std::isnan(x) ? uint16_t{0x7fff} : narrow.bits;  // the one NaN of cvt
}
template <class T>
float Widened(uint16_t bits) {
  return Widen(T{bits});
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

// The same of a register that is wider than the number, which is its lower part.
std::string OfWide(const std::string& opcode) { return opcode + " of 64 bits"; }

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

// ---- Moves between registers of different widths

void Join(Warp& warp, const Instruction& i, uint32_t lanes) {
  const int width = static_cast<int>(i.number) / i.count;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!Has(lanes, lane)) continue;
    uint64_t value = 0;
    for (int part = 0; part < i.count; ++part) {
      const uint64_t bits = warp.Words(i.operands[1 + part])[lane];
      value |= (bits & ((uint64_t{1} << width) - 1)) << (width * part);
    }
    if (i.number == 64) {
      Set<uint64_t>(warp, i.operands[0], lane, value);
    } else {
      Set<uint32_t>(warp, i.operands[0], lane, static_cast<uint32_t>(value));
    }
  }
}
void Separate(Warp& warp, const Instruction& i, uint32_t lanes) {
  const int width = static_cast<int>(i.number) / i.count;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!Has(lanes, lane)) continue;
    const uint64_t value = i.number == 64 ? Get<uint64_t>(warp, i.operands[0], lane)
                                          : Get<uint32_t>(warp, i.operands[0], lane);
    for (int part = 0; part < i.count; ++part)
      Set<uint32_t>(warp, i.operands[1 + part], lane,
                    static_cast<uint32_t>(value >> (width * part) & ((uint64_t{1} << width) - 1)));
  }
}
void BuildPackedMove(int bits, const std::vector<std::string>& texts, Operands& operands,
                     Instruction* i) {
  const bool joins = texts[1].front() == '{';
  const std::vector<std::string> parts = Parts(texts[joins ? 1 : 0]);
  const int width = bits / static_cast<int>(parts.size());
  i->act = joins ? Join : Separate;
  i->number = bits;
  i->count = static_cast<uint8_t>(parts.size());
  i->operands[0] = joins ? operands.Result(texts[0], bits) : operands.Source(texts[1], bits);
  for (size_t part = 0; part < parts.size(); ++part)
    i->operands[1 + part] =
        joins ? operands.Source(parts[part], width) : operands.Result(parts[part], width);
}

// ---- Addresses and memory

template <uint64_t kWindow, bool kToGeneric>
void ConvertAddress(Warp& warp, const Instruction& i, uint32_t lanes) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!Has(lanes, lane)) continue;
    const auto address = Get<uint64_t>(warp, i.operands[1], lane);
    if (!kToGeneric && kWindow != 0 && (address & kWindow) == 0)
      throw Error("an address is not in the space that it is converted to");
    Set<uint64_t>(warp, i.operands[0], lane, kToGeneric ? address | kWindow : address & ~kWindow);
  }
}

void Load(Warp& warp, const Instruction& i, uint32_t lanes) {
  const int bytes = i.bytes * i.count;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!Has(lanes, lane)) continue;
    const unsigned char* from =
        warp.Locate(i.space, warp.AddressIn(i.addresses[0], lane), bytes, bytes, false, lane);
    for (int n = 0; n < i.count; ++n, from += i.bytes) {
      uint64_t value = 0;
      std::memcpy(&value, from, i.bytes);
      if (i.number != 0) {  // signed
        const int unused = 64 - 8 * i.bytes;
        value = static_cast<uint64_t>(static_cast<int64_t>(value << unused) >> unused);
      }
      if (i.wide) {
        Set<uint64_t>(warp, i.operands[n], lane, value);
      } else {
        Set<uint32_t>(warp, i.operands[n], lane, static_cast<uint32_t>(value));
      }
    }
  }
}
void Store(Warp& warp, const Instruction& i, uint32_t lanes) {
  const int bytes = i.bytes * i.count;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!Has(lanes, lane)) continue;
    unsigned char* to =
        warp.Locate(i.space, warp.AddressIn(i.addresses[0], lane), bytes, bytes, true, lane);
    for (int n = 0; n < i.count; ++n, to += i.bytes) {
      const uint64_t value = i.wide ? Get<uint64_t>(warp, i.operands[n], lane)
                                    : Get<uint32_t>(warp, i.operands[n], lane);
      std::memcpy(to, &value, i.bytes);
    }
  }
}

std::vector<std::string> SplitAtDots(const std::string& opcode) {
  std::vector<std::string> parts(1);
  for (const char c : opcode)
    if (c == '.') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  return parts;
}
bool TakeSpace(const std::string& part, Space* space) {
  static const std::map<std::string, Space> spaces = {{"global", Space::kGlobal},
                                                      {"shared", Space::kShared},
                                                      {"local", Space::kLocal},
                                                      {"param", Space::kParam}};
  const auto found = spaces.find(part);
  if (found != spaces.end()) *space = found->second;
  return found != spaces.end();
}
// Bits of "u32", "f64", ...; 0 if it is no such type.
int TakeType(const std::string& type) {
  if (type.size() < 2 || std::string("bsuf").find(type[0]) == std::string::npos) return 0;
  const std::string bits = type.substr(1);
  return bits == "8" || bits == "16" || bits == "32" || bits == "64" ? std::atoi(bits.c_str()) : 0;
}

// ld and st: space, .nc, .v2, .v4, type.
bool BuildAccess(const std::vector<std::string>& parts, const std::vector<std::string>& texts,
                 Operands& operands, Instruction* i) {
  const bool load = parts[0] == "ld";
  i->count = 1;
  for (size_t p = 1; p + 1 < parts.size(); ++p) {
    if (TakeSpace(parts[p], &i->space) || parts[p] == "nc") continue;
    if (parts[p] != "v2" && parts[p] != "v4") return false;
    i->count = static_cast<uint8_t>(parts[p][1] - '0');
  }
  const int bits = TakeType(parts.back());
  if (bits == 0 || texts.size() != 2) return false;
  i->act = load ? Load : Store;
  i->bytes = static_cast<uint8_t>(bits / 8);
  i->number = parts.back()[0] == 's';
  i->addresses[0] = operands.AddressOf(texts[load ? 1 : 0]);
  const std::vector<std::string> values = Parts(texts[load ? 0 : 1]);
  if (values.size() != i->count) return false;
  for (size_t n = 0; n < values.size(); ++n) {
    // A register may be wider than what is loaded or stored.
    const int wanted = std::max({operands.BitsOf(values[n]), bits, 16});
    if (n > 0 && i->wide != (wanted == 64)) return false;
    i->wide = wanted == 64;
    i->operands[n] = load ? operands.Result(values[n], wanted) : operands.Source(values[n], wanted);
  }
  return true;
}

// atom: lanes take turns.
template <class T, class F>
void Atomic(Warp& warp, const Instruction& i, uint32_t lanes, F function) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!Has(lanes, lane)) continue;
    unsigned char* const at = warp.Locate(i.space, warp.AddressIn(i.addresses[0], lane), sizeof(T),
                                          sizeof(T), true, lane);
    T before;
    std::memcpy(&before, at, sizeof before);
    const T after = function(before, Get<T>(warp, i.operands[1], lane));
    std::memcpy(at, &after, sizeof after);
    if (i.operands[0] != kNone) Set<T>(warp, i.operands[0], lane, before);
  }
}
template <class T>
Action AtomicAction(const std::string& name) {
  if (name == "add")
    return [](Warp& w, const Instruction& i, uint32_t lanes) {
      Atomic<T>(w, i, lanes, [](T x, T y) { return static_cast<T>(x + y); });
    };
  if (name == "min")
    return [](Warp& w, const Instruction& i, uint32_t lanes) {
      Atomic<T>(w, i, lanes, [](T x, T y) { return x < y ? x : y; });
    };
  if (name == "max")
    return [](Warp& w, const Instruction& i, uint32_t lanes) {
      Atomic<T>(w, i, lanes, [](T x, T y) { return x > y ? x : y; });
    };
  return nullptr;
}
// atom or red, of 32 bits: space, operation, type.
bool BuildAtomic(const std::vector<std::string>& parts, const std::vector<std::string>& texts,
                 Operands& operands, Instruction* i) {
  const bool returns = parts[0] == "atom";
  if (parts.size() < 3 || texts.size() != (returns ? 3u : 2u)) return false;
  for (size_t p = 1; p + 2 < parts.size(); ++p)
    if (!TakeSpace(parts[p], &i->space)) return false;
  const std::string &name = parts[parts.size() - 2], &type = parts.back();
  if (type == "s32") i->act = AtomicAction<int32_t>(name);
  if (type == "u32") i->act = AtomicAction<uint32_t>(name);
  if (i->act == nullptr) return false;
  i->operands[0] = returns ? operands.Result(texts[0], 32) : kNone;
  i->addresses[0] = operands.AddressOf(texts[returns ? 1 : 0]);
  i->operands[1] = operands.Source(texts[returns ? 2 : 1], 32);
  return true;
}

void CopyAsync(Warp& warp, const Instruction& i, uint32_t lanes) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!Has(lanes, lane)) continue;
    const auto valid = Get<uint32_t>(warp, i.operands[0], lane);
    if (valid > static_cast<uint64_t>(i.number)) throw Error("a copy reads more than it writes");
    warp.CopyAsync(lane, warp.AddressIn(i.addresses[0], lane), warp.AddressIn(i.addresses[1], lane),
                   static_cast<int>(i.number), static_cast<int>(valid));
  }
}
void CommitCopies(Warp& warp, const Instruction&, uint32_t lanes) {
  for (int lane = 0; lane < kLanes; ++lane)
    if (Has(lanes, lane)) warp.CommitCopies(lane);
}
void WaitForCopies(Warp& warp, const Instruction& i, uint32_t lanes) {
  for (int lane = 0; lane < kLanes; ++lane)
    if (Has(lanes, lane)) warp.WaitForCopies(lane, static_cast<size_t>(i.number));
}

// ---- Among the lanes of a warp

enum class From { kIndex, kButterfly, kUp, kDown };
template <From kFrom>
void Shuffle(Warp& warp, const Instruction& i, uint32_t lanes) {
  uint32_t result[kLanes] = {}, valid = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!Has(lanes, lane)) continue;
    const int b = static_cast<int>(Get<uint32_t>(warp, i.operands[2], lane) & 31);
    const auto c = Get<uint32_t>(warp, i.operands[3], lane);
    const int mask = static_cast<int>(c >> 8 & 31), clamp = static_cast<int>(c & 31);
    const int first = lane & mask, last = first | (clamp & ~mask);
    int source = kFrom == From::kIndex       ? first | (b & ~mask)
                 : kFrom == From::kButterfly ? lane ^ b
                 : kFrom == From::kUp        ? lane - b
                                             : lane + b;
    const bool in_range = kFrom == From::kUp ? source >= last : source <= last;
    if (!in_range) source = lane;
    if (!Has(lanes, source)) throw Error("a shuffle reads a lane that takes no part");
    valid |= static_cast<uint32_t>(in_range) << lane;
    result[lane] = Get<uint32_t>(warp, i.operands[1], source);
  }
  for (int lane = 0; lane < kLanes; ++lane)
    if (Has(lanes, lane)) Set<uint32_t>(warp, i.operands[0], lane, result[lane]);
  if (i.operands[4] != kNone) SetPredicate(warp, i.operands[4], lanes, valid);
}
template <From kFrom>
void BuildShuffle(const std::vector<std::string>& texts, Operands& operands, Instruction* i) {
  const size_t bar = texts[0].find('|');
  i->kind = Kind::kCollective;
  i->act = Shuffle<kFrom>;
  i->operands[0] = operands.Result(texts[0].substr(0, bar), 32);
  for (int n = 1; n < 4; ++n) i->operands[n] = operands.Source(texts[n], 32);
  i->operands[4] = bar == std::string::npos ? kNone : operands.Result(texts[0].substr(bar + 1), 1);
  i->members = operands.Source(texts[4], 32);
}

void VoteAny(Warp& warp, const Instruction& i, uint32_t lanes) {
  SetPredicate(warp, i.operands[0], lanes, (*warp.Words(i.operands[1]) & lanes) != 0 ? kAll : 0);
}
void VoteAll(Warp& warp, const Instruction& i, uint32_t lanes) {
  SetPredicate(warp, i.operands[0], lanes, (~*warp.Words(i.operands[1]) & lanes) == 0 ? kAll : 0);
}
template <Action kAct>
void BuildVote(const std::vector<std::string>& texts, Operands& operands, Instruction* i) {
  i->kind = Kind::kCollective;
  i->act = kAct;
  i->operands[0] = operands.Result(texts[0], 1);
  i->operands[1] = operands.Source(texts[1], 1);
  i->members = operands.Source(texts[2], 32);
}

void Nothing(Warp&, const Instruction&, uint32_t) {}

// Four matrices of 8x8 numbers of 16 bits; lane 8 n + r names row r of matrix n.
template <bool kTransposed>
void LoadMatrices(Warp& warp, const Instruction& i, uint32_t) {
  uint16_t rows[kLanes][8];
  for (int lane = 0; lane < kLanes; ++lane)
    std::memcpy(
        rows[lane],
        warp.Locate(Space::kShared, warp.AddressIn(i.addresses[0], lane), 16, 16, false, lane), 16);
  for (int n = 0; n < 4; ++n)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const auto at = [&](int r, int c) {
        return uint32_t{kTransposed ? rows[8 * n + c][r] : rows[8 * n + r][c]};
      };
      Set<uint32_t>(warp, i.operands[n], lane, at(row, column) | at(row, column + 1) << 16);
    }
}
template <bool kTransposed>
void BuildLoadMatrices(const std::vector<std::string>& texts, Operands& operands, Instruction* i) {
  i->kind = Kind::kCollective;
  i->act = LoadMatrices<kTransposed>;
  const std::vector<std::string> results = Parts(texts[0]);
  for (int n = 0; n < 4; ++n) i->operands[n] = operands.Result(results.at(n), 32);
  i->addresses[0] = operands.AddressOf(texts[1]);
}

// ---- Tensor cores. Fragments are those of "Matrix fragments for mma" in the PTX ISA.

enum class Factor { kBFloat16, kHalf, kTf32 };
template <Factor kFactor>
void MultiplyMatrices(Warp& warp, const Instruction& i, uint32_t) {
  constexpr bool k16 = kFactor != Factor::kTf32;
  constexpr int kDepth = k16 ? 16 : 8;
  float a[16][kDepth], b[kDepth][8], d[16][8];
  const auto widened = [](uint32_t bits) {
    const auto half = static_cast<uint16_t>(bits);
    return kFactor == Factor::kHalf ? Widened<Half>(half) : Widened<BFloat16>(half);
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int n = 0; n < 4; ++n) {
      d[g + 8 * (n / 2)][2 * t + n % 2] = Get<float>(warp, i.operands[10 + n], lane);
      const auto word = Get<uint32_t>(warp, i.operands[4 + n], lane);
      if (k16) {
        a[g + 8 * (n % 2)][2 * t + 8 * (n / 2)] = widened(word);
        a[g + 8 * (n % 2)][2 * t + 8 * (n / 2) + 1] = widened(word >> 16);
      } else {
        a[g + 8 * (n % 2)][t + 4 * (n / 2)] = FromBits(word & ~0x1fffu);
      }
    }
    for (int n = 0; n < 2; ++n) {
      const auto word = Get<uint32_t>(warp, i.operands[8 + n], lane);
      if (k16) {
        b[2 * t + 8 * n][g] = widened(word);
        b[2 * t + 8 * n + 1][g] = widened(word >> 16);
      } else {
        b[t + 4 * n][g] = FromBits(word & ~0x1fffu);
      }
    }
  }
  constexpr int kLeast = kFactor == Factor::kHalf ? -14 : -126;
  sim::AddProducts(TheOptions().tensor_cores, kDepth, kLeast, a[0], b[0], d[0]);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int n = 0; n < 4; ++n)
      Set<float>(warp, i.operands[n], lane, d[lane / 4 + 8 * (n / 2)][lane % 4 * 2 + n % 2]);
}
template <Factor kFactor>
void BuildProduct(const std::vector<std::string>& texts, Operands& operands, Instruction* i) {
  i->kind = Kind::kCollective;
  i->act = MultiplyMatrices<kFactor>;
  Place* to = i->operands;
  constexpr size_t kCounts[] = {4, 4, 2, 4};
  for (size_t n = 0; n < 4; ++n) {
    const std::vector<std::string> registers = Parts(texts[n]);
    if (registers.size() != kCounts[n]) throw Error("mma with other fragments");
    for (const std::string& text : registers)
      *to++ = n == 0 ? operands.Result(text, 32) : operands.Source(text, 32);
  }
}

// ---- What is built in a way of its own

using Texts = std::vector<std::string>;

void DefineSpecial(Table& t) {
  const auto special = [&](const std::string& name, decltype(Form::build) build, size_t count) {
    t[name] = {std::vector<int>(count), nullptr, build};
  };
  for (const char* name : {"bra", "bra.uni"})
    special(
        name,
        [](const Texts& texts, Operands& operands, Instruction* i) {
          i->kind = Kind::kBranch;
          i->target = operands.Target(texts[0]);
        },
        1);
  special("ret", [](const Texts&, Operands&, Instruction* i) { i->kind = Kind::kExit; }, 0);
  special(
      "bar.sync",
      [](const Texts& texts, Operands&, Instruction* i) {
        if (texts[0] != "0") throw Error("only barrier 0 is known");
        i->kind = Kind::kBarrier;
      },
      1);
  special(
      "bar.warp.sync",
      [](const Texts& texts, Operands& operands, Instruction* i) {
        i->kind = Kind::kCollective;
        i->act = Nothing;
        i->members = operands.Source(texts[0], 32);
      },
      1);
  special("shfl.sync.idx.b32", BuildShuffle<From::kIndex>, 5);
  special("shfl.sync.bfly.b32", BuildShuffle<From::kButterfly>, 5);
  special("shfl.sync.up.b32", BuildShuffle<From::kUp>, 5);
  special("shfl.sync.down.b32", BuildShuffle<From::kDown>, 5);
  special("vote.sync.any.pred", BuildVote<VoteAny>, 3);
  special("vote.sync.all.pred", BuildVote<VoteAll>, 3);
  special("ldmatrix.sync.aligned.m8n8.x4.shared.b16", BuildLoadMatrices<false>, 2);
  special("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", BuildLoadMatrices<true>, 2);
  special("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", BuildProduct<Factor::kBFloat16>,
          4);
  special("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", BuildProduct<Factor::kHalf>, 4);
  special("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", BuildProduct<Factor::kTf32>, 4);
  special(
      "cp.async.cg.shared.global",
      [](const Texts& texts, Operands& operands, Instruction* i) {
        if (texts[2] != "16") throw Error("copies must be of 16 bytes");
        i->act = CopyAsync;
        i->number = 16;
        for (int n = 0; n < 2; ++n) i->addresses[n] = operands.AddressOf(texts[n]);
        i->operands[0] = operands.Source(texts[3], 32);
      },
      4);
  special(
      "cp.async.commit_group",
      [](const Texts&, Operands&, Instruction* i) { i->act = CommitCopies; }, 0);
  special(
      "cp.async.wait_group",
      [](const Texts& texts, Operands&, Instruction* i) {
        i->act = WaitForCopies;
        i->number = std::stoi(texts[0]);
      },
      1);
  t["cvta.to.global.u64"] = {{64, 64}, ConvertAddress<0, false>};
  t["cvta.global.u64"] = {{64, 64}, ConvertAddress<0, true>};
  t["cvta.to.shared.u64"] = {{64, 64}, ConvertAddress<kSharedWindow, false>};
  t["cvta.shared.u64"] = {{64, 64}, ConvertAddress<kSharedWindow, true>};
  t["cvta.to.local.u64"] = {{64, 64}, ConvertAddress<kLocalWindow, false>};
  t["cvta.local.u64"] = {{64, 64}, ConvertAddress<kLocalWindow, true>};
}

Table MakeTable() {
  Table t;
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
  // DefineBits' shifts to the right are those of numbers without a sign.
  DefineFields<uint32_t>(t, "32");
  DefineFields<uint64_t>(t, "64");
  DefineFloats(t);
  DefinePredicates(t);
  DefineConversions(t);
  Define<uint32_t, uint32_t, uint32_t, uint32_t>(
      t, "prmt.b32", [](uint32_t low, uint32_t high, uint32_t selection) {
        return Permuted(low, high, selection);
      });
  DefineSpecial(t);
  return t;
}

}  // namespace

void BuildInstruction(const std::string& opcode, const std::vector<std::string>& texts,
                      Operands& operands, Instruction* instruction) {
  static const Table table = MakeTable();
  const std::vector<std::string> parts = SplitAtDots(opcode);
  const bool braces = texts.size() == 2 && (texts[0].front() == '{' || texts[1].front() == '{');
  if (parts[0] == "ld" || parts[0] == "st") {
    if (BuildAccess(parts, texts, operands, instruction)) return;
  } else if (parts[0] == "atom" || parts[0] == "red") {
    if (BuildAtomic(parts, texts, operands, instruction)) return;
  } else if (braces && (opcode == "mov.b32" || opcode == "mov.b64")) {
    return BuildPackedMove(TakeType(parts[1]), texts, operands, instruction);
  }
  const bool of_wide =
      parts[0] == "cvt" && operands.BitsOf(texts.back()) == 64 && table.count(OfWide(opcode)) != 0;
  const auto found = table.find(of_wide ? OfWide(opcode) : opcode);
  if (found == table.end()) throw Error("instruction " + opcode + " is not known");
  const Form& form = found->second;
  if (texts.size() != form.bits.size())
    throw Error(opcode + " takes " + std::to_string(form.bits.size()) + " operands");
  if (form.build != nullptr) return form.build(texts, operands, instruction);
  instruction->act = form.act;
  for (size_t n = 0; n < texts.size(); ++n)
    instruction->operands[n] =
        n == 0 ? operands.Result(texts[n], form.bits[n]) : operands.Source(texts[n], form.bits[n]);
}

}  // namespace ptx
}  // namespace performer
