// Packing of operands for the products.
//
// The operands of bidirectional attention have the element type In. With In = Acc they are the rows
// of Acc in scratch memory. With In = Pair (bfloat16 calls, where the processor multiplies
// bfloat16) they are copies, rounded to bfloat16, in pairs of neighbours along the summed index;
// sums, masses, maxima and states stay float32. The operators define that the projection is rounded
// to bfloat16. As its scale would round it once more, the scale multiplies the products instead.
#pragma once
#include <type_traits>

#include "cpu/memory/arena.h"
#include "cpu/memory/layout.h"
#include "cpu/simd/convert.h"
#include "cpu/simd/math.h"
#include "cpu/simd/tile.h"

PERFORMER_ISA_BEGIN

// x [m][width], rows `stride` apart, to panels of its transpose [m_panels][width][kPanel], padded
// with zeros. (Rows m apart would use only a part of the L1 sets.)
template <class Acc>
PERFORMER_INLINE void TransposeToPanels(const Acc* x, int64_t m, int64_t width, int64_t stride,
                                        Acc* panels) {
  for (int64_t first = 0; first < m; first += kPanel, panels += width * kPanel) {
    const Acc* from = x + first * stride;
    const int64_t rows = m - first < kPanel ? m - first : kPanel;
    const int64_t whole_rows = rows / 4 * 4, whole_width = width / 4 * 4;
    Transpose(from, stride, whole_rows, whole_width, panels, kPanel);
    for (int64_t e = 0; e < width; ++e)
      for (int64_t r = e < whole_width ? whole_rows : 0; r < kPanel; ++r)
        panels[e * kPanel + r] = r < rows ? from[r * stride + e] : Acc(0);
  }
}

// Writes one projection [m, d], rounded once to `dtype` and times sqrt(scale), in the layouts of
// PackedProjection.
template <class Acc>
void PackProjection(const Attributes& attributes, DType dtype, const Strides& strides,
                    const Acc* from, Acc* to) {
  const double root = __builtin_sqrt(attributes.ResolvedScale(strides.d));
  const double base = attributes.feature_map == FeatureMap::kSoftmax ? kLog2eDouble : 1.0;
  Acc* panels = to;
  Acc* rows = to + strides.m_panels * kPanel * strides.d;
  Acc* base2_rows = rows + strides.m * strides.d_pad;
  for (int64_t m = 0; m < strides.m; ++m) {
    Acc *row = rows + m * strides.d_pad, *base2_row = base2_rows + m * strides.d_pad;
    for (int64_t d = 0; d < strides.d_pad; ++d)
      row[d] = d < strides.d ? RoundTo(dtype, from[m * strides.d + d]) : Acc(0);
    for (int64_t d = 0; d < strides.d_pad; d += kLanes<Acc>) {
      const Vec<Acc> x = Load(row + d);
      Store(row + d, x * static_cast<Acc>(root));
      Store(base2_row + d, x * static_cast<Acc>(root * base));
    }
  }
  TransposeToPanels(base2_rows, strides.m, strides.d, strides.d_pad, panels);
}

// The left operand a of a product: a[r][k] is data[r * row_stride + k * depth_stride].
template <class In>
struct Left {
  const In* data;  // [rows][depth] with these strides
  int64_t row_stride, depth_stride;
};
// The right operand b of a product: b[k][c] is data[k * stride + c].
template <class In>
struct Right {
  const In* data;  // [depth][stride]
  int64_t stride;
};

// The projection as right operand of log-features (its transpose, in panels) and of gradients.
template <class Acc, class In>
struct ProjectionOperands {
  const In* panels;              // [m_panels][Depth(d)][kPanel]
  Right<In> rows;                // [Depth(m)][d_pad]
  Acc feature_scale, row_scale;  // multiply the products with panels, with rows
};

template <class Acc, class In>
struct Operands {
  // Elements along the summed index for a sum of n terms.
  static constexpr int64_t Depth(int64_t n) { return n; }
  // Elements of the copy of an operand of so many numbers.
  static constexpr int64_t Size(int64_t) { return 0; }
  // Numbers as the products take them.
  static PERFORMER_INLINE Vec<Acc> Rounded(Vec<Acc> x) { return x; }

  // Whether rows of a tensor, to be padded to `width`, can serve as left operand without a copy.
  static bool IsLeftInPlace(const ConstRows& rows, int64_t width) {
    return rows.dtype == kOwnType<Acc> && rows.width == width;
  }
  static Left<In> LeftInPlace(const ConstRows& rows, int64_t row) {
    return {rows.At<In>(row), rows.heads * rows.width, 1};
  }
  // x [n][width] as left operand, summed over its columns.
  static Left<In> MakeLeft(const Acc* x, int64_t, int64_t, int64_t stride, In*) {
    return {x, stride, 1};
  }
  // x^T as left operand, summed over the rows of x.
  static Left<In> MakeLeftTransposed(const Acc* x, int64_t, int64_t, int64_t stride, In*) {
    return {x, 1, stride};
  }
  // x [n][width] as right operand, summed over its rows.
  static Right<In> MakeRight(const Acc* x, int64_t, int64_t, int64_t stride, In*) {
    return {x, stride};
  }
  // The same of rows of a tensor, with 0 for masked rows; `copy` serves if a copy of Acc is needed.
  static Right<In> LoadRight(const ConstRows& rows, int64_t row, int64_t n, const uint8_t* skip,
                             int64_t stride, Acc* copy, In*, Prefetcher* prefetcher) {
    LoadRows(rows, row, n, skip, copy, stride, prefetcher);
    return {copy, stride};
  }
  // Panels [m_panels][width][kPanel] as right operand, packed in place.
  static const In* MakePanels(Acc* panels, int64_t, int64_t) { return panels; }

  static ProjectionOperands<Acc, In> Projection(const Attributes&, const Acc* packed,
                                                const Strides& strides) {
    const auto given = PackedProjection<Acc>::At(packed, strides);
    return {given.panels, {given.rows, strides.d_pad}, 1, 1};
  }
};

#if defined(__AVX512BF16__)
// {a[c], b[c]} for the 16 bfloat16 a and the 16 b of {a, b}.
PERFORMER_INLINE __m512i Interleaved(__m512i halves) {
  alignas(kAlignment) static constexpr uint16_t kOrder[] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
}

// to[c] = {a[c], b[c]} for c < width, a multiple of 16.
template <class T>
PERFORMER_INLINE void Interleave(const T* a, const T* b, int64_t width, Pair* to) {
  for (int64_t c = 0; c < width; c += 16) {
    __m512i halves;
    if constexpr (sizeof(T) == sizeof(float)) {
      halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(Load(b + c), Load(a + c)));
    } else {
      const auto load = [](const T* x) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
      };
      halves = _mm512_inserti64x4(_mm512_castsi256_si512(load(a + c)), load(b + c), 1);
    }
    _mm512_storeu_si512(to + c, Interleaved(halves));
  }
}

template <>
struct Operands<float, Pair> {
  static constexpr int64_t Depth(int64_t n) { return (n + 1) / 2; }
  static constexpr int64_t Size(int64_t numbers) { return numbers; }  // room for an odd row
  static PERFORMER_INLINE Vec<float> Rounded(Vec<float> x) {
    const __m256i narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
    return reinterpret_cast<Vec<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
  }

  static bool IsLeftInPlace(const ConstRows& rows, int64_t width) {
    return rows.dtype == DType::kBFloat16 && rows.width == width;
  }
  static Left<Pair> LeftInPlace(const ConstRows& rows, int64_t row) {
    return {reinterpret_cast<const Pair*>(rows.At<BFloat16>(row)), rows.heads * rows.width / 2, 1};
  }
  static Left<Pair> MakeLeft(const float* x, int64_t n, int64_t width, int64_t stride, Pair* to) {
    const int64_t pair_stride = stride / 2;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < width; c += 16)
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(to + i * pair_stride + c / 2),
            reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(Load(x + i * stride + c))));
    return {to, pair_stride, 1};
  }
  static Left<Pair> MakeLeftTransposed(const float* x, int64_t n, int64_t width, int64_t stride,
                                       Pair* to) {
    const Right<Pair> right = MakeRight(x, n, width, stride, to);
    return {right.data, 1, right.stride};
  }
  static Right<Pair> MakeRight(const float* x, int64_t n, int64_t width, int64_t stride, Pair* to) {
    for (int64_t i = 0; i + 1 < n; i += 2)
      Interleave(x + i * stride, x + (i + 1) * stride, width, to + i / 2 * stride);
    if (n % 2 != 0) {
      Pair* last = to + n / 2 * stride;
      for (int64_t c = 0; c < width; ++c)
        last[c] = {BFloat16Bits(x[(n - 1) * stride + c])};  // the upper half is 0
    }
    return {to, stride};
  }
  static Right<Pair> LoadRight(const ConstRows& rows, int64_t row, int64_t n, const uint8_t* skip,
                               int64_t stride, float* copy, Pair* to, Prefetcher* prefetcher) {
    if (!IsLeftInPlace(rows, stride)) {
      LoadRows(rows, row, n, skip, copy, stride, prefetcher);
      return MakeRight(copy, n, stride, stride, to);
    }
    prefetcher->RequestNext(rows, row, n);
    BFloat16* zeros = reinterpret_cast<BFloat16*>(copy);
    for (int64_t e = 0; e < stride; ++e) zeros[e] = {0};
    const auto at = [&](int64_t i) {
      return i < n && !(skip && skip[i]) ? rows.At<BFloat16>(row + i) : zeros;
    };
    for (int64_t i = 0; i < n; i += 2) Interleave(at(i), at(i + 1), stride, to + i / 2 * stride);
    return {to, stride};
  }
  static const Pair* MakePanels(float* panels, int64_t count, int64_t width) {
    Pair* to = reinterpret_cast<Pair*>(panels);
    for (int64_t p = 0; p < count; ++p, panels += width * kPanel, to += Depth(width) * kPanel)
      MakeRight(panels, width, kPanel, kPanel, to);  // it never writes beyond what it has read
    return reinterpret_cast<const Pair*>(to - count * Depth(width) * kPanel);
  }

  // The projection as Pack wrote it.
  static ProjectionOperands<float, Pair> Projection(const Attributes& attributes,
                                                    const float* packed, const Strides& strides) {
    const Pair* panels = reinterpret_cast<const Pair*>(packed);
    const double root = __builtin_sqrt(attributes.ResolvedScale(strides.d));
    const double base = attributes.feature_map == FeatureMap::kSoftmax ? kLog2eDouble : 1.0;
    return {panels,
            {panels + strides.m_panels * Depth(strides.d) * kPanel, strides.d_pad},
            static_cast<float>(root * base),
            static_cast<float>(root)};
  }
  // Numbers of float that have the size of a projection as Pack writes it: about half of those of
  // PackedProjection.
  static constexpr int64_t PackedSize(const Strides& strides) {
    return strides.m_panels * Depth(strides.d) * kPanel + Depth(strides.m) * strides.d_pad;
  }
  // Writes one projection [m, d], rounded to bfloat16.
  static void Pack(const Strides& strides, const float* from, float* to) {
    Pair* panels = reinterpret_cast<Pair*>(to);
    Pair* rows = panels + strides.m_panels * Depth(strides.d) * kPanel;
    __builtin_memset(to, 0, static_cast<size_t>(PackedSize(strides)) * sizeof(float));
    for (int64_t m = 0; m < strides.m; ++m)
      for (int64_t d = 0; d < strides.d; ++d) {
        const uint32_t bits = BFloat16Bits(from[m * strides.d + d]);
        panels[(m / kPanel * Depth(strides.d) + d / 2) * kPanel + m % kPanel].bits |= bits
                                                                                      << d % 2 * 16;
        rows[m / 2 * strides.d_pad + d].bits |= bits << m % 2 * 16;
      }
  }

 private:
  static PERFORMER_INLINE uint32_t BFloat16Bits(float x) {
    BFloat16 narrow;
    Narrow(x, &narrow);
    return narrow.bits;
  }
};
#endif

// Memory for the copy of an operand of `numbers` numbers.
template <class Acc, class In>
PERFORMER_INLINE In* TakeOperand(Arena& arena, int64_t numbers) {
  return arena.Take<In>(Operands<Acc, In>::Size(numbers));
}

// Rows of a tensor as left operand, summed over their columns, without a copy if that is possible.
template <class Acc, class In>
PERFORMER_INLINE Left<In> LoadLeft(const ConstRows& rows, int64_t row, int64_t n, int64_t width,
                                   Acc* copy, In* operand, Prefetcher* prefetcher) {
  if (Operands<Acc, In>::IsLeftInPlace(rows, width)) {
    prefetcher->RequestNext(rows, row, n);
    return Operands<Acc, In>::LeftInPlace(rows, row);
  }
  LoadRows(rows, row, n, nullptr, copy, width, prefetcher);
  return Operands<Acc, In>::MakeLeft(copy, n, width, width, operand);
}

// c[rows][cols] = a b, or += with kAdd, summed over `terms` rows of what b was made from. The hook
// and the scale are those of MatMul.
template <bool kAdd, class Acc, class In, class Hook = void>
PERFORMER_INLINE void Product(const Left<In>& a, const Right<In>& b, int64_t terms, Acc* c,
                              int64_t ldc, int64_t rows, int64_t cols, Hook* hook = nullptr,
                              Acc scale = 1) {
  MatMul<kAdd>(a.data, a.row_stride, a.depth_stride, b.data, b.stride,
               Operands<Acc, In>::Depth(terms), c, ldc, rows, cols, hook, scale);
}

PERFORMER_ISA_END
