// Operands of the bidirectional products, made from rows of Acc in scratch memory.
//
// In = Acc: they are those rows. In = Pair (bfloat16 calls, where the processor multiplies
// bfloat16): copies rounded to bfloat16, in pairs of neighbours along the summed index; sums,
// masses, maxima and states stay float32. The projection is rounded to bfloat16 by the
// definition of the operators; its scale would round it once more, so it multiplies the products.
#pragma once
#include <type_traits>

#include "cpu/kernels/log_features.h"

PERFORMER_ISA_BEGIN

// a[r * row + k * step]
template <class In>
struct Left {
  const In* at;
  int64_t row, step;
};
// b[k * stride + c]
template <class In>
struct Right {
  const In* at;
  int64_t stride;
};

// The projection as a right operand: of log-features (its transpose, in panels) and of gradients.
template <class Acc, class In>
struct ProjectionOperands {
  const In* panels;  // [m_panels][Depth(d)][kPanel]
  Right<In> rows;    // [Depth(m)][d_pad]
  Acc feature_scale, row_scale;
};

template <class Acc, class In>
struct Operands {
  static constexpr int64_t Depth(int64_t n) { return n; }
  static constexpr int64_t Size(int64_t) { return 0; }  // of the copy of as many numbers

  // Whether rows of a tensor, to be padded to `width`, are a left operand as they lie; and that.
  static bool Fits(const ConstRows& rows, int64_t width) {
    return rows.dtype == kOwnType<Acc> && rows.width == width;
  }
  static Left<In> InPlace(const ConstRows& rows, int64_t row) {
    return {rows.At<In>(row), rows.heads * rows.width, 1};
  }
  // x [n][width] as left operand, summed over its columns; or over its rows.
  static Left<In> Rows(const Acc* x, int64_t, int64_t, int64_t stride, In*) {
    return {x, stride, 1};
  }
  static Left<In> Columns(const Acc* x, int64_t, int64_t, int64_t stride, In*) {
    return {x, 1, stride};
  }
  // x [n][width] as right operand, summed over its rows.
  static Right<In> Stack(const Acc* x, int64_t, int64_t, int64_t stride, In*) {
    return {x, stride};
  }
  // The same of rows of a tensor, masked ones as 0, by way of a copy of Acc if it takes one.
  static Right<In> StackOf(const ConstRows& rows, int64_t row, int64_t n, const uint8_t* skip,
                           int64_t stride, Acc* copy, In*, Prefetcher* prefetcher) {
    LoadRows(rows, row, n, skip, copy, stride, prefetcher);
    return {copy, stride};
  }
  // Panels [m_panels][width][kPanel] as right operand, in place.
  static const In* Panels(Acc* panels, int64_t, int64_t) { return panels; }

  static ProjectionOperands<Acc, In> Projection(const Attributes&, const Acc* packed,
                                                const Strides& strides) {
    const auto given = PackedProjection<Acc>::At(packed, strides);
    return {given.panels, {given.rows, strides.d_pad}, 1, 1};
  }
};

#if defined(__AVX512BF16__)
// to[c] = {a[c], b[c]} for c < width, a multiple of 16.
template <class T>
PERFORMER_INLINE void Interleave(const T* a, const T* b, int64_t width, Pair* to) {
  alignas(kAlignment) static constexpr uint16_t kOrder[] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(kOrder);
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
    _mm512_storeu_si512(to + c, _mm512_permutexvar_epi16(order, halves));
  }
}

template <>
struct Operands<float, Pair> {
  static constexpr int64_t Depth(int64_t n) { return (n + 1) / 2; }
  static constexpr int64_t Size(int64_t numbers) { return numbers; }  // enough for an odd row more

  static bool Fits(const ConstRows& rows, int64_t width) {
    return rows.dtype == DType::kBFloat16 && rows.width == width;
  }
  static Left<Pair> InPlace(const ConstRows& rows, int64_t row) {
    return {reinterpret_cast<const Pair*>(rows.At<BFloat16>(row)), rows.heads * rows.width / 2, 1};
  }
  static Left<Pair> Rows(const float* x, int64_t n, int64_t width, int64_t stride, Pair* to) {
    const int64_t step = stride / 2;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < width; c += 16)
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(to + i * step + c / 2),
            reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(Load(x + i * stride + c))));
    return {to, step, 1};
  }
  static Left<Pair> Columns(const float* x, int64_t n, int64_t width, int64_t stride, Pair* to) {
    const Right<Pair> stack = Stack(x, n, width, stride, to);
    return {stack.at, 1, stack.stride};
  }
  static Right<Pair> Stack(const float* x, int64_t n, int64_t width, int64_t stride, Pair* to) {
    for (int64_t i = 0; i + 1 < n; i += 2)
      Interleave(x + i * stride, x + (i + 1) * stride, width, to + i / 2 * stride);
    if (n % 2 != 0) {
      Pair* last = to + n / 2 * stride;
      for (int64_t c = 0; c < width; ++c)
        last[c] = {Half16(x[(n - 1) * stride + c])};  // and 0 above
    }
    return {to, stride};
  }
  static Right<Pair> StackOf(const ConstRows& rows, int64_t row, int64_t n, const uint8_t* skip,
                             int64_t stride, float* copy, Pair* to, Prefetcher* prefetcher) {
    if (!Fits(rows, stride)) {
      LoadRows(rows, row, n, skip, copy, stride, prefetcher);
      return Stack(copy, n, stride, stride, to);
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
  static const Pair* Panels(float* panels, int64_t count, int64_t width) {
    Pair* to = reinterpret_cast<Pair*>(panels);
    for (int64_t p = 0; p < count; ++p, panels += width * kPanel, to += Depth(width) * kPanel)
      Stack(panels, width, kPanel, kPanel, to);  // never ahead of what it reads
    return reinterpret_cast<const Pair*>(to - count * Depth(width) * kPanel);
  }

  // As `Pack` wrote it.
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
  // Half of the memory of PackedProjection is enough.
  static void Pack(const Strides& strides, const float* from, float* to) {
    Pair* panels = reinterpret_cast<Pair*>(to);
    Pair* rows = panels + strides.m_panels * Depth(strides.d) * kPanel;
    __builtin_memset(to, 0,
                     static_cast<size_t>(PackedProjection<float>::Size(strides)) * sizeof(float));
    for (int64_t m = 0; m < strides.m; ++m)
      for (int64_t d = 0; d < strides.d; ++d) {
        const uint32_t bits = Half16(from[m * strides.d + d]);
        panels[(m / kPanel * Depth(strides.d) + d / 2) * kPanel + m % kPanel].bits |= bits
                                                                                      << d % 2 * 16;
        rows[m / 2 * strides.d_pad + d].bits |= bits << m % 2 * 16;
      }
  }

 private:
  static PERFORMER_INLINE uint32_t Half16(float x) {
    BFloat16 narrow;
    Narrow(x, &narrow);
    return narrow.bits;
  }
};
#endif

// Rows of a tensor as left operand summed over their columns, without a copy if it can be.
template <class Acc, class In>
PERFORMER_INLINE Left<In> LoadLeft(const ConstRows& rows, int64_t row, int64_t n, int64_t width,
                                   Acc* copy, In* operand, Prefetcher* prefetcher) {
  if (Operands<Acc, In>::Fits(rows, width)) {
    prefetcher->RequestNext(rows, row, n);
    return Operands<Acc, In>::InPlace(rows, row);
  }
  LoadRows(rows, row, n, nullptr, copy, width, prefetcher);
  return Operands<Acc, In>::Rows(copy, n, width, width, operand);
}

// The keys of a chunk likewise, if none is masked; with their offsets.
template <class Acc, class In>
PERFORMER_INLINE Left<In> LoadKeys(const ConstRows& rows, int64_t row, int64_t n,
                                   const Map<Acc>& map, int64_t width, KeyChunk<Acc>* keys,
                                   In* operand, Prefetcher* prefetcher) {
  using T = std::conditional_t<std::is_same_v<In, Acc>, Acc, BFloat16>;
  if (keys->all && Operands<Acc, In>::Fits(rows, width)) {
    prefetcher->RequestNext(rows, row, n);
    keys->FinishOffsets(
        map, n, [&](int64_t j) { return SquaredNorm<Acc>(rows.template At<T>(row + j), width); });
    return Operands<Acc, In>::InPlace(rows, row);
  }
  LoadRows(rows, row, n, keys->skip, keys->k, width, prefetcher);
  keys->FinishOffsets(map, n,
                      [&](int64_t j) { return SquaredNorm<Acc>(keys->k + j * width, width); });
  return Operands<Acc, In>::Rows(keys->k, n, width, width, operand);
}

// Log-features as in log_features.h, of any operands, with the maxima that hook gathers; of maps that
// are not linear it cannot, and `pass` does so afterwards.
template <class Acc, class In, class Hook, class Pass>
PERFORMER_INLINE void LogFeatures(const Map<Acc>& map, const Left<In>& x, int64_t n,
                                  const ProjectionOperands<Acc, In>& projection,
                                  const Strides& strides, Acc* f, Acc* slope, Hook hook,
                                  Pass pass) {
  constexpr auto kDepth = Operands<Acc, In>::Depth;
  if (map.linear()) {
    MatMulPanelsWith(x.at, x.row, n, projection.panels, kDepth(strides.d), strides, f,
                     hook.prefetcher, &hook, projection.feature_scale);
  } else {
    MatMulPanels(x.at, x.row, n, projection.panels, kDepth(strides.d), strides, f, hook.prefetcher,
                 projection.feature_scale);
    ApplyMap(map, n, strides.m_pad, strides.m_stride, f, slope);
    pass();
  }
}

// c[rows][cols] = a b, or += with kAdd; summed over `terms` rows of what b was made from. A hook or
// a scale as in MatMul.
template <bool kAdd, class Acc, class In, class Hook = void>
PERFORMER_INLINE void Product(const Left<In>& a, const Right<In>& b, int64_t terms, Acc* c,
                              int64_t ldc, int64_t rows, int64_t cols, Hook* hook = nullptr,
                              Acc scale = 1) {
  MatMul<kAdd>(a.at, a.row, a.step, b.at, b.stride, Operands<Acc, In>::Depth(terms), c, ldc, rows,
               cols, hook, scale);
}

PERFORMER_ISA_END
