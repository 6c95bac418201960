// Operands of the products of causal attention, of type In: Acc, or Pair in bfloat16 calls where the
// processor multiplies bfloat16 (packed_operands.h).
//
// With Pair a sub-chunk is paired if it begins with its chunk and is not steep, as nearly all are:
// its key features are a right operand, [m / 2][C], for the scores, and a left one, [m][C / 2], for
// the state. Other sub-chunks are those of Acc.
//
// Not rounded are masses, and the scores, the weights of single keys. Queries read means, sum / mass,
// which a constant value leaves as it is; key features for the scores are over the mass, too. (In the
// place of a mass below 1 stands 1: no weight becomes larger than it would be with Acc.)
#pragma once
#include "cpu/kernels/causal/sub_chunks.h"
#include "cpu/memory/packed_operands.h"
#include "cpu/simd/math.h"

PERFORMER_ISA_BEGIN

// One projection, in memory of PackedProjection::Size: the panels of Acc, which sub-chunks that are
// not paired need, then the operands of type In.
template <class Acc, class In>
struct CausalProjection {
  Left<In> rows;  // [m][Depth(d)]
  Acc scale;      // multiplies the products with rows

  static void Pack(const Attributes& attributes, DType dtype, const Strides& strides,
                   const Acc* from, Acc* to) {
    PackProjection<Acc>(attributes, dtype, strides, from, to);
  }
  // Where the operands begin.
  static const Acc* OperandsAt(const Acc* packed, const Strides&) { return packed; }
  static CausalProjection At(const Attributes&, const Acc* packed, const Strides& strides) {
    return {{PackedProjection<Acc>::At(packed, strides).base2_rows, strides.d_pad, 1}, 1};
  }
};

#if defined(__AVX512BF16__)
template <>
struct CausalProjection<float, Pair> {
  using Operand = Operands<float, Pair>;
  Left<Pair> rows;
  float scale;

  static void Pack(const Attributes& attributes, DType dtype, const Strides& strides,
                   const float* from, float* to) {
    PackProjection<float>(attributes, dtype, strides, from, to);
    float* operands = to + PanelsSize(strides);
    Operand::Pack(strides, from, operands);
    Pair* rows = reinterpret_cast<Pair*>(operands + Operand::PackedSize(strides));
    __builtin_memset(rows, 0, static_cast<size_t>(strides.m * strides.d_pad / 2) * sizeof(Pair));
    for (int64_t m = 0; m < strides.m; ++m) {
      BFloat16* row = reinterpret_cast<BFloat16*>(rows + m * strides.d_pad / 2);
      for (int64_t d = 0; d < strides.d; ++d) Narrow(from[m * strides.d + d], row + d);
    }
  }
  static const float* OperandsAt(const float* packed, const Strides& strides) {
    return packed + PanelsSize(strides);
  }
  static CausalProjection At(const Attributes& attributes, const float* packed,
                             const Strides& strides) {
    const float* operands = OperandsAt(packed, strides);
    const Pair* rows = reinterpret_cast<const Pair*>(operands + Operand::PackedSize(strides));
    return {{rows, strides.d_pad / 2, 1},
            Operand::Projection(attributes, operands, strides).feature_scale};
  }

 private:
  static int64_t PanelsSize(const Strides& strides) {
    return strides.m_panels * kPanel * strides.d;
  }
};
#endif

// 1 / mass, at most 1. Masses are less only where the first key of a sub-chunk outweighs them.
template <class Acc>
PERFORMER_INLINE Acc OverMass(Acc mass) {
  return mass > 1 ? 1 / mass : Acc(1);
}

// The state before a sub-chunk as its queries read it. With Acc it is that of the sub-chunk.
template <class Acc, class In>
struct StateOperands {
  void SetPointers(Arena&, const Strides&) {}
  void Set(const CausalSubChunk<Acc>& sub_chunk, const Strides& strides) {
    log_weight = sub_chunk.anchor;
    weight = sub_chunk.mass;
    values = {sub_chunk.sum, strides.e_pad};
  }

  const Acc *log_weight, *weight;  // [m_pad], of the features: 2^log_weight weight in all
  Right<In> values;                // [Depth(m)][e_pad]
};

#if defined(__AVX512BF16__)
template <>
struct StateOperands<float, Pair> {
  void SetPointers(Arena& arena, const Strides& strides) {
    log_mass_ = arena.Take<float>(strides.m_pad);
    share_ = arena.Take<float>(strides.m_pad);
    mean_ = TakeOperand<float, Pair>(arena, (strides.m + 1) * strides.e_pad);
    log_weight = log_mass_;
    weight = share_;
    values = {mean_, strides.e_pad};
  }
  void Set(const CausalSubChunk<float>& sub_chunk, const Strides& strides) {
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<float>) {
      const Vec<float> mass = Load(sub_chunk.mass + m), least = Max(mass, Splat(1.0f));
      Store(log_mass_ + m, Load(sub_chunk.anchor + m) + Log2(least));
      Store(share_ + m, mass / least);
    }
    const auto row = [&](int64_t m) { return sub_chunk.sum + m * strides.e_pad; };
    for (int64_t m = 0; m < strides.m; m += 2) {
      const bool both = m + 1 < strides.m;
      const float first = OverMass(sub_chunk.mass[m]),
                  second = both ? OverMass(sub_chunk.mass[m + 1]) : 0.0f;
      for (int64_t e = 0; e < strides.e_pad; e += kLanes<float>) {
        const Vec<float> x = Load(row(m) + e) * first, none = {},
                         y = both ? Load(row(m + 1) + e) * second : none;
        _mm512_storeu_si512(mean_ + m / 2 * strides.e_pad + e,
                            Interleaved(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x))));
      }
    }
  }

  const float *log_weight, *weight;
  Right<Pair> values;

 private:
  float *log_mass_, *share_;
  Pair* mean_;
};
#endif

// The keys, key features and values of a chunk as operands. Those of Acc lie in KeyScratch.
template <class Acc, class In>
struct KeyOperands {
  In *k_left, *k_right;         // [C][Depth(d_pad)], [Depth(d_pad)][C]
  In *features_left, *v_right;  // [m][Depth(C)], [Depth(C)][e_pad]

  void SetPointers(Arena& arena, const Strides& strides) {
    k_left = TakeOperand<Acc, In>(arena, kCausalChunk * strides.d_pad);
    k_right = arena.Take<In>(kCausalChunk * Operands<Acc, In>::Depth(strides.d_pad));
    features_left = TakeOperand<Acc, In>(arena, strides.m * kCausalChunk);
    v_right = TakeOperand<Acc, In>(arena, kCausalChunk * strides.e_pad);
  }
};

PERFORMER_ISA_END
