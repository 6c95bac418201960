// The only place with PTX. Each wrapper has a host twin of the same name that does what the PTX ISA
// says, for the emulator (sim/emulator.h): kernels are ordinary C++ above this header.
//
// Fragments are those of "Matrix fragments for mma" in the PTX ISA; g = lane / 4, t = lane % 4.
#pragma once
#include <cstdint>
#include <type_traits>

#include "core/half.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define PERFORMER_DEVICE __device__ __forceinline__
#define PERFORMER_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#else
#include "sim/cuda.h"
#include "sim/tensor_cores.h"
#define PERFORMER_DEVICE inline
#define PERFORMER_SHARED_MEMORY(name) unsigned char* const name = ::performer::sim::SharedMemory()
#endif

namespace performer {
namespace cuda {

using performer::BFloat16;
using performer::Half;

#if defined(__CUDACC__)

PERFORMER_DEVICE uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
PERFORMER_DEVICE float AsFloat(uint32_t x) { return __uint_as_float(x); }
PERFORMER_DEVICE uint32_t AsBits(float x) { return __float_as_uint(x); }

// d [16][8] += a [16][16] b [16][8], float32 sums of 16-bit products.
template <class T>
PERFORMER_DEVICE void MmaM16N8K16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1);
template <>
PERFORMER_DEVICE void MmaM16N8K16<BFloat16>(float (&d)[4], const uint32_t* a, uint32_t b0,
                                            uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
PERFORMER_DEVICE void MmaM16N8K16<Half>(float (&d)[4], const uint32_t* a, uint32_t b0,
                                        uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d [16][8] += a [16][8] b [8][8], float32 sums of products of tf32 (float32 whose low 13 bits are
// ignored).
PERFORMER_DEVICE void MmaTf32M16N8K8(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices of 16-bit numbers. Lane 8 i + r gives the address of row r of matrix i, aligned
// to 16 bytes; r[i] receives elements (g, 2t) and (g, 2t + 1) of matrix i, of its transpose with
// Trans.
PERFORMER_DEVICE void LdMatrixX4(uint32_t* r, const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(p))
               : "memory");
}
PERFORMER_DEVICE void LdMatrixX4Trans(uint32_t* r, const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(p))
               : "memory");
}

// Copies 16 bytes from global to shared memory, or writes zeros (and reads nothing) if !valid. Both
// aligned to 16 bytes. The data are there for this thread after CpAsyncWait, for others after a
// barrier that follows it.
PERFORMER_DEVICE void CpAsync16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
PERFORMER_DEVICE void CpAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kLeft committed groups are in flight.
template <int kLeft>
PERFORMER_DEVICE void CpAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// x, of which the compiler knows nothing: what is computed from it is computed where it is used,
// instead of being kept in registers across a loop.
PERFORMER_DEVICE int Opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 2^x: max relative error 2^-22, subnormal arguments and results are 0 (PTX ISA, ex2.approx.ftz).
PERFORMER_DEVICE float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// log2(x): max error 2^-22.6, absolute in [0.5, 2] and relative outside; subnormal arguments are 0
// (PTX ISA, lg2.approx.ftz).
PERFORMER_DEVICE float Log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers rounded to nearest even; `low` lies in the low half.
template <class T>
PERFORMER_DEVICE uint32_t Pack(float low, float high);
template <>
PERFORMER_DEVICE uint32_t Pack<BFloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
PERFORMER_DEVICE uint32_t Pack<Half>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
PERFORMER_DEVICE float HalfToFloat(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
// Rounded to the nearest tf32, ties away from 0.
PERFORMER_DEVICE uint32_t ToTf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

#else  // the host twins

inline float AsFloat(uint32_t x) { return FromBits(x); }
inline uint32_t AsBits(float x) { return BitsOf(x); }

inline float HalfToFloat(uint16_t bits) { return Widen(Half{bits}); }
// As cvt rounds; it has one NaN, of either sign for half and positive for bfloat16.
inline uint16_t ToHalfBits(float x) {
  Half narrow;
  Narrow(x, &narrow);
  const bool nan = (narrow.bits & 0x7fff) > 0x7c00;
  return static_cast<uint16_t>(nan ? narrow.bits | 0x7fff : narrow.bits);
}
inline uint32_t ToBFloat16Bits(float x) {
  BFloat16 narrow;
  Narrow(x, &narrow);
  return x != x ? 0x7fff : narrow.bits;
}
template <class T>
inline uint32_t Pack(float low, float high);
template <>
inline uint32_t Pack<BFloat16>(float low, float high) {
  return ToBFloat16Bits(low) | ToBFloat16Bits(high) << 16;
}
template <>
inline uint32_t Pack<Half>(float low, float high) {
  return ToHalfBits(low) | uint32_t{ToHalfBits(high)} << 16;
}
inline uint32_t ToTf32(float x) {
  const uint32_t bits = AsBits(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}
inline int Opaque(int x) { return x; }
inline float Exp2(float x) {
  ++sim::TheCounters().exponentials;
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.f : y;
}
inline float Log2(float x) { return std::log2(std::fabs(x) < 0x1p-126f ? 0.f : x); }

// The numbers of a pair, to to[0] and to[step].
template <class T>
inline void Unpack16(float* to, int step, uint32_t pair) {
  if constexpr (std::is_same_v<T, Half>) {
    to[0] = HalfToFloat(static_cast<uint16_t>(pair));
    to[step] = HalfToFloat(static_cast<uint16_t>(pair >> 16));
  } else {
    to[0] = AsFloat(pair << 16);
    to[step] = AsFloat(pair & 0xffff0000u);
  }
}
struct MmaSlot {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};
// d += a b for one warp, once the operands are gathered. `min_exponent`: of the operands' type.
template <int K>
PERFORMER_SIM_REGISTERS inline void MmaSum(void** slots, int min_exponent, const float (&a)[16][K],
                                           const float (&b)[K][8]) {
  ++sim::TheCounters().mma;
  float d[16][8];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = static_cast<MmaSlot*>(slots[lane])->d[i];
  sim::AddProducts(sim::TheOptions().tensor_cores, K, min_exponent, a[0], b[0], d[0]);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      static_cast<MmaSlot*>(slots[lane])->d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}
// m16n8k16: a_i row g + 8 (i/2 % 2), column 2t + i%2 + 8 (i/4); b_i row 2t + i%2 + 8 (i/2), column
// g; d_i row g + 8 (i/2), column 2t + i%2.
template <class T>
PERFORMER_SIM_REGISTERS inline void ApplyMma16(void** slots, uint32_t) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* slot = static_cast<const MmaSlot*>(slots[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
      Unpack16<T>(&a[g + 8 * (i % 2)][2 * t + 8 * (i / 2)], 1, slot->a[i]);
    for (int i = 0; i < 2; ++i) Unpack16<T>(&b[2 * t + 8 * i][g], 8, slot->b[i]);
  }
  MmaSum<16>(slots, std::is_same_v<T, Half> ? -14 : -126, a, b);
}
// m16n8k8 of tf32: a0 (g, t), a1 (g + 8, t), a2 (g, t + 4), a3 (g + 8, t + 4); b0 (t, g), b1 (t +
// 4, g); d as above.
PERFORMER_SIM_REGISTERS inline void ApplyMmaTf32(void** slots, uint32_t) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* slot = static_cast<const MmaSlot*>(slots[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
      a[g + 8 * (i % 2)][t + 4 * (i / 2)] = AsFloat(slot->a[i] & ~0x1fffu);
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = AsFloat(slot->b[i] & ~0x1fffu);
  }
  MmaSum<8>(slots, -126, a, b);
}
template <class T>
inline void MmaM16N8K16(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  MmaSlot slot{d, a, {b0, b1}};
  sim::Collective(~0u, std::is_same_v<T, Half> ? "mma.m16n8k16.f16" : "mma.m16n8k16.bf16", &slot,
                  ApplyMma16<T>);
}
inline void MmaTf32M16N8K8(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  MmaSlot slot{d, a, {b0, b1}};
  sim::Collective(~0u, "mma.m16n8k8.tf32", &slot, ApplyMmaTf32);
}

// The row is read by the lane that named it, where sanitizers see it, then exchanged.
struct LdMatrixSlot {
  uint16_t row[8];
  uint32_t* r;
  uintptr_t address;
};
template <bool kTrans>
PERFORMER_SIM_REGISTERS inline void ApplyLdMatrix(void** slots, uint32_t) {
  ++sim::TheCounters().ldmatrix;
  const auto at = [&](int lane) { return static_cast<LdMatrixSlot*>(slots[lane]); };
  for (int i = 0; i < 4; ++i) {
    unsigned uses[8] = {}, worst = 0;  // of each 16 bytes of the 128 that one pass reads
    for (int r = 0; r < 8; ++r) {
      unsigned& use = uses[at(8 * i + r)->address / 16 % 8];
      worst = ++use > worst ? use : worst;
    }
    sim::TheCounters().ldmatrix_conflicts += worst - 1;
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = kTrans ? at(8 * i + 2 * t)->row[g] : at(8 * i + g)->row[2 * t];
      const uint32_t high = kTrans ? at(8 * i + 2 * t + 1)->row[g] : at(8 * i + g)->row[2 * t + 1];
      at(lane)->r[i] = low | high << 16;
    }
  }
}
template <bool kTrans>
inline void LdMatrix(uint32_t* r, const void* p, const char* name) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) sim::Fail("ldmatrix: row not aligned to 16 bytes");
  LdMatrixSlot slot;
  for (int i = 0; i < 8; ++i) slot.row[i] = static_cast<const uint16_t*>(p)[i];
  slot.r = r;
  slot.address = reinterpret_cast<uintptr_t>(p);
  sim::Collective(~0u, name, &slot, ApplyLdMatrix<kTrans>);
}
inline void LdMatrixX4(uint32_t* r, const void* p) { LdMatrix<false>(r, p, "ldmatrix.x4"); }
inline void LdMatrixX4Trans(uint32_t* r, const void* p) {
  LdMatrix<true>(r, p, "ldmatrix.x4.trans");
}

inline void CpAsync16(void* to, const void* from, bool valid) {
  sim::CopyAsync(to, from, 16, valid ? 16 : 0);
}
inline void CpAsyncCommit() { sim::CopyAsyncCommit(); }
template <int kLeft>
inline void CpAsyncWait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  sim::CopyAsyncWait(kLeft, file, line);
}

#endif

// Single numbers.
template <class T>
PERFORMER_DEVICE float ToFloat(T x);
template <>
PERFORMER_DEVICE float ToFloat<float>(float x) {
  return x;
}
template <>
PERFORMER_DEVICE float ToFloat<BFloat16>(BFloat16 x) {
  return AsFloat(static_cast<uint32_t>(x.bits) << 16);
}
template <>
PERFORMER_DEVICE float ToFloat<Half>(Half x) {
  return HalfToFloat(x.bits);
}
template <class T>
PERFORMER_DEVICE T FromFloat(float x) {
  return T{static_cast<uint16_t>(Pack<T>(x, 0.f) & 0xffffu)};
}
template <>
PERFORMER_DEVICE float FromFloat<float>(float x) {
  return x;
}
// The halves of a pair.
template <class T>
PERFORMER_DEVICE float Low(uint32_t pair) {
  return ToFloat(T{static_cast<uint16_t>(pair & 0xffffu)});
}
template <class T>
PERFORMER_DEVICE float High(uint32_t pair) {
  return ToFloat(T{static_cast<uint16_t>(pair >> 16)});
}

}  // namespace cuda
}  // namespace performer
