#include "sim/tensor_cores.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

// The emulator spends a good part of its time here, so that rows are added eight columns at a time.
#if defined(__x86_64__) && !defined(__AVX2__)
#define PERFORMER_SIM_VECTORS __attribute__((target_clones("avx2", "default")))
#else
#define PERFORMER_SIM_VECTORS
#endif
#define PERFORMER_SIM_INLINE inline __attribute__((always_inline))

namespace performer {
namespace sim {
namespace {

constexpr int kRows = 16, kColumns = 8;
typedef float Floats __attribute__((vector_size(4 * kColumns)));
typedef int32_t Ints __attribute__((vector_size(4 * kColumns)));
typedef uint32_t Words __attribute__((vector_size(4 * kColumns)));

// The exponent of zero, which aligns nothing; exponents are kept in float32.
constexpr float kNone = -1e6f;
// Exponents for which the arithmetic below is exact in float32.
constexpr float kSmall = -100, kLarge = 120;

struct Model {
  int fraction_bits;  // kept, relative to the largest exponent
  int min_exponent;   // what is smaller is aligned to this one
};

PERFORMER_SIM_INLINE int32_t BitsOf(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
PERFORMER_SIM_INLINE bool IsFinite(float x) { return (BitsOf(x) & 0x7f800000) != 0x7f800000; }

float TowardZero(double x) {
  if (std::fabs(x) >= 0x1p128) return std::copysign(HUGE_VALF, static_cast<float>(x));
  const float y = static_cast<float>(x);
  return std::fabs(static_cast<double>(y)) > std::fabs(x) ? std::nextafter(y, 0.f) : y;
}

// One sum of `count` products; those of b are kColumns apart.
float AddOne(const Model& model, int count, const float* a, const float* a_exponent, const float* b,
             const float* b_exponent, float d) {
  bool finite = IsFinite(d);
  float top = d == 0.f ? kNone : static_cast<float>(std::max(std::ilogb(d), -126));
  for (int k = 0; k < count; ++k) {
    finite &= IsFinite(a[k]) && IsFinite(b[k * kColumns]);
    top = std::max(top, a_exponent[k] + b_exponent[k * kColumns]);
  }
  if (!finite) {
    float sum = 0;
    for (int k = 0; k < count; ++k) sum += a[k] * b[k * kColumns];
    return d + sum;
  }
  if (top < kNone / 2) return 0.f;
  const int last = std::max(static_cast<int>(top), model.min_exponent) - model.fraction_bits;
  double sum = std::trunc(std::ldexp(d, -last));
  for (int k = 0; k < count; ++k)
    sum += std::trunc(std::ldexp(static_cast<double>(a[k]) * b[k * kColumns], -last));
  return TowardZero(std::ldexp(sum, last));
}

PERFORMER_SIM_INLINE Floats Max(Floats x, Floats y) { return x > y ? x : y; }
PERFORMER_SIM_INLINE bool Any(Ints mask) {
  int64_t parts[sizeof(mask) / 8];
  std::memcpy(parts, &mask, sizeof(mask));
  return (parts[0] | parts[1] | parts[2] | parts[3]) != 0;
}
// Exact below 2^24.
PERFORMER_SIM_INLINE Floats ToFloats(Words x) {
  return __builtin_convertvector(reinterpret_cast<Ints>(x), Floats);
}
// 2^x of whole numbers.
PERFORMER_SIM_INLINE Floats PowerOfTwo(Floats x) {
  return reinterpret_cast<Floats>((__builtin_convertvector(x, Ints) + 127) << 23);
}

PERFORMER_SIM_INLINE Ints ExponentBits(Floats x) { return reinterpret_cast<Ints>(x) & 0x7f800000; }
PERFORMER_SIM_INLINE Floats ExponentOf(Floats x, int min_exponent) {
  const Floats exponent = __builtin_convertvector((ExponentBits(x) >> 23) - 127, Floats);
  return x == 0.f ? Floats{} + kNone : Max(exponent, Floats{} + static_cast<float>(min_exponent));
}

// Whole numbers, of which the highest 24 bits are kept.
PERFORMER_SIM_INLINE Floats CutToFloat(Words x) {
  const Ints log2_of_upper = (ExponentBits(ToFloats(x >> 8)) >> 23) - 127;  // exact, and -127 for 0
  const Ints shift = log2_of_upper > 15 ? log2_of_upper - 15 : Ints{};
  x = x >> reinterpret_cast<Words>(shift) << reinterpret_cast<Words>(shift);
  return ToFloats(x >> 8) * 256.f + ToFloats(x & 255);
}

// Copies numbers with their exponents; returns whether all are finite.
template <int kCount>
PERFORMER_SIM_INLINE bool CopyOperand(int min_exponent, const float* from, Floats* to,
                                      Floats* exponent) {
  Ints special = {};
  for (int i = 0; i < kCount / kColumns; ++i) {
    std::memcpy(&to[i], from + i * kColumns, sizeof(to[i]));
    exponent[i] = ExponentOf(to[i], min_exponent);
    special |= ExponentBits(to[i]) == 0x7f800000;
  }
  return !Any(special);
}

// The sums of kCount products in a row; false, and nothing done, where an exponent is too far out.
template <int kCount>
PERFORMER_SIM_INLINE bool AddRow(const Model& model, const float* a, const float* a_exponent,
                                 const Floats* b, const Floats* b_exponent, Floats* d) {
  // An accumulator that is not finite stays what it is, as all products are finite.
  const Ints stays = ExponentBits(*d) == 0x7f800000;
  const Floats given = stays ? Floats{} : *d;
  Floats top = ExponentOf(given, -126);
  for (int k = 0; k < kCount; ++k) top = Max(top, a_exponent[k] + b_exponent[k]);
  const Ints none = top < kNone / 2;
  if (Any(((top < kSmall) & ~none) | (top > kLarge))) return false;
  top = none ? Floats{} : top;
  const Floats up = PowerOfTwo(static_cast<float>(model.fraction_bits) - top);
  Ints sum = {};  // 16 products of less than 2^27: less than 2^31
  for (int k = 0; k < kCount; ++k) sum += __builtin_convertvector(a[k] * b[k] * up, Ints);
  const Ints start = __builtin_convertvector(given * up, Ints);
  const Ints negative = (sum >> 1) + (start >> 1) + (sum & start & 1) < 0;
  // Less than 2^32 in size, so that what wraps around gives the right size.
  const Words total = reinterpret_cast<Words>(sum) + reinterpret_cast<Words>(start);
  const Floats size = CutToFloat(negative ? -total : total) *
                      PowerOfTwo(top - static_cast<float>(model.fraction_bits));
  const Floats result = negative ? -size : size;
  *d = stays ? *d : result;
  return true;
}

template <int kDepth, int kCount>
PERFORMER_SIM_INLINE void AddSteps(const Model& model, int min_exponent, const float* a,
                                   const float* b, float* d) {
  Floats a_copy[kRows * kDepth / kColumns], a_exponents[kRows * kDepth / kColumns];
  Floats b_copy[kDepth], b_exponents[kDepth];
  const bool finite = CopyOperand<kRows * kDepth>(min_exponent, a, a_copy, a_exponents) &
                      CopyOperand<kDepth * kColumns>(min_exponent, b, b_copy, b_exponents);
  for (int row = 0; row < kRows; ++row) {
    Floats sums;
    std::memcpy(&sums, d + row * kColumns, sizeof(sums));
    for (int first = 0; first < kDepth; first += kCount) {
      const float* const a_row = a + row * kDepth + first;
      const float* const a_exponent =
          reinterpret_cast<const float*>(a_exponents) + row * kDepth + first;
      if (finite &&
          AddRow<kCount>(model, a_row, a_exponent, b_copy + first, b_exponents + first, &sums))
        continue;
      for (int column = 0; column < kColumns; ++column)
        sums[column] =
            AddOne(model, kCount, a_row, a_exponent, b + first * kColumns + column,
                   reinterpret_cast<const float*>(b_exponents + first) + column, sums[column]);
    }
    std::memcpy(d + row * kColumns, &sums, sizeof(sums));
  }
}

}  // namespace

TensorCores ParseTensorCores(const std::string& name) {
  if (name == "H100") return TensorCores::kH100;
  if (name == "A100") return TensorCores::kA100;
  throw std::invalid_argument("tensor_cores must be H100 or A100; got '" + name + "'");
}

PERFORMER_SIM_VECTORS
void AddProducts(TensorCores cores, int depth, int min_exponent, const float* a, const float* b,
                 float* d) {
  constexpr Model kH100 = {25, -133}, kA100 = {24, -132};
  if (cores == TensorCores::kH100)
    return depth == 16 ? AddSteps<16, 16>(kH100, min_exponent, a, b, d)
                       : AddSteps<8, 8>(kH100, min_exponent, a, b, d);
  return depth == 16 ? AddSteps<16, 8>(kA100, min_exponent, a, b, d)
                     : AddSteps<8, 4>(kA100, min_exponent, a, b, d);
}

}  // namespace sim
}  // namespace performer
