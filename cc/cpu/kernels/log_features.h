// Log-features of rows, the features 2^(log-features - shift), and what else the query side and the
// key side share. Logarithms are in base 2 throughout.
#pragma once
#include <type_traits>

#include "cpu/memory/packed_operands.h"

PERFORMER_ISA_BEGIN

// The feature map of a call, with the numbers that it needs.
template <class Acc>
struct Map {
  FeatureMap kind;
  Acc epsilon, scale;
  bool key_norm;

  explicit Map(const Common& call)
      : kind(call.attributes.feature_map),
        epsilon(static_cast<Acc>(call.attributes.feature_epsilon)),
        scale(static_cast<Acc>(call.attributes.ResolvedScale(call.dims.key_dim))),
        key_norm(call.attributes.key_norm && call.attributes.feature_map == FeatureMap::kSoftmax) {}
  // Whether log-features are linear in the products with the projection.
  bool linear() const { return kind == FeatureMap::kSoftmax; }
};

template <class Acc>
PERFORMER_INLINE Acc Dot(const Acc* a, const Acc* b, int64_t n) {
  Vec<Acc> sum = {};
  for (int64_t i = 0; i < n; i += kLanes<Acc>) sum += Load(a + i) * Load(b + i);
  return ReduceAdd<Acc>(sum);
}

// sum_i x_i^2, for a width that is a multiple of the lanes. For x of any type the result is that of
// its copy in Acc.
template <class Acc, class T>
PERFORMER_INLINE Acc SquaredNorm(const T* x, int64_t width) {
  Vec<Acc> sum = {};
  for (int64_t i = 0; i < width; i += kLanes<Acc>) {
    Acc lane[kLanes<Acc>];
    for (int l = 0; l < kLanes<Acc>; ++l) lane[l] = Widen(x[i + l]);
    sum += Load(lane) * Load(lane);
  }
  return ReduceAdd<Acc>(sum);
}

// Hooks of MatMulPanels: they prefetch rows, and gather maxima while the results are in registers.
template <class Acc>
struct RowMaxima {
  Prefetcher* prefetcher;
  const Acc* bias;  // [m_pad], added first
  Acc* row_max;     // [n][kLanes]: the maximum of a row is that of its lanes
  int64_t column = 0;

  PERFORMER_INLINE void Before() { prefetcher->Before(); }
  template <class Tile>
  PERFORMER_INLINE void After(Tile& tile, int64_t r0, int64_t c0) {
    Vec<Acc> added[Tile::kVecs];
    PERFORMER_UNROLL
    for (int j = 0; j < Tile::kVecs; ++j) added[j] = Load(bias + column + c0 + j * kLanes<Acc>);
    PERFORMER_UNROLL
    for (int r = 0; r < Tile::kRows; ++r) {
      Vec<Acc> highest = Load(row_max + (r0 + r) * kLanes<Acc>);
      PERFORMER_UNROLL
      for (int j = 0; j < Tile::kVecs; ++j) highest = Max(tile.v[r][j] + added[j], highest);
      Store(row_max + (r0 + r) * kLanes<Acc>, highest);
    }
  }
};
template <class Acc>
struct ColumnMaxima {
  Prefetcher* prefetcher;
  const Acc* offset;  // [n], added first
  Acc* column_max;    // [m_pad]
  int64_t column = 0;

  PERFORMER_INLINE void Before() { prefetcher->Before(); }
  template <class Tile>
  PERFORMER_INLINE void After(Tile& tile, int64_t r0, int64_t c0) {
    PERFORMER_UNROLL
    for (int j = 0; j < Tile::kVecs; ++j) {
      Acc* to = column_max + column + c0 + j * kLanes<Acc>;
      Vec<Acc> highest = Load(to);
      PERFORMER_UNROLL
      for (int r = 0; r < Tile::kRows; ++r)
        highest = Max(tile.v[r][j] + offset[r0 + r], highest);  // in this order NaN is ignored
      Store(to, highest);
    }
  }
};

// c[n][m_pad] = a [n][depth] times panels [m_panels][depth][kPanel]; rows of c are m_stride apart.
// The prefetcher works meanwhile; the hook and the scale are those of MatMul.
template <class In, class Acc, class Hook>
PERFORMER_INLINE void MatMulPanelsWith(const In* a, int64_t lda, int64_t n, const In* panels,
                                       int64_t depth, const Strides& strides, Acc* c,
                                       Prefetcher* prefetcher, Hook* hook, Acc scale) {
  prefetcher->Divide(HookCalls<Acc>(n, depth, strides.m_pad));
  for (int64_t m = 0; m < strides.m_pad; m += kPanel) {
    const int64_t cols = strides.m_pad - m < kPanel ? strides.m_pad - m : kPanel;
    if constexpr (!std::is_same_v<Hook, Prefetcher>) hook->column = m;
    MatMul<false>(a, lda, 1, panels + m * depth, kPanel, depth, c + m, strides.m_stride, n, cols,
                  hook, scale);
  }
}
template <class In, class Acc>
PERFORMER_INLINE void MatMulPanels(const In* a, int64_t lda, int64_t n, const In* panels,
                                   int64_t depth, const Strides& strides, Acc* c,
                                   Prefetcher* prefetcher, Acc scale = 1) {
  MatMulPanelsWith(a, lda, n, panels, depth, strides, c, prefetcher, prefetcher, scale);
}

// The epilogue of the maps that are not linear: replaces u by log2 phi(u) and, if kSlope, sets
// slope = d log phi / du.
template <class Acc, bool kSlope>
void ApplyEpilogue(const Map<Acc>& map, int64_t n, int64_t width, int64_t stride, Acc* f,
                   Acc* slope) {
  const Vec<Acc> zero = {}, one = Splat(Acc(1));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t m = i * stride; m < i * stride + width; m += kLanes<Acc>) {
      const Vec<Acc> u = Load(f + m);
      if (map.kind == FeatureMap::kRelu) {
        const Vec<Acc> phi = (u < Acc(0) ? zero : u) + map.epsilon;  // in this order NaN stays NaN
        if constexpr (kSlope) Store(slope + m, u > Acc(0) ? one / phi : zero);
        Store(f + m, Log2(phi));
      } else {
        if constexpr (kSlope) Store(slope + m, u > Acc(0) ? one / (one + u) : one);
        Store(f + m, u > Acc(0) ? Log2(one + u) : u * kLog2e<Acc>);
      }
    }
}
template <class Acc>
PERFORMER_INLINE void ApplyMap(const Map<Acc>& map, int64_t n, int64_t width, int64_t stride,
                               Acc* f, Acc* slope) {
  if (map.linear()) return;
  if (slope) {
    ApplyEpilogue<Acc, true>(map, n, width, stride, f, slope);
  } else {
    ApplyEpilogue<Acc, false>(map, n, width, stride, f, slope);
  }
}

// f[i][m] = log2 phi_m(x_i) without biases and norms. slope (d log phi / du) may be nullptr; it is
// not written for linear maps.
template <class Acc>
PERFORMER_INLINE void LogFeatures(const Map<Acc>& map, const Acc* x, int64_t n, const Acc* panels,
                                  const Strides& strides, Acc* f, Acc* slope,
                                  Prefetcher* prefetcher) {
  MatMulPanels(x, strides.d_pad, n, panels, strides.d, strides, f, prefetcher);
  ApplyMap(map, n, strides.m_pad, strides.m_stride, f, slope);
}

// The same for operands of any type, with the maxima that the hook gathers. For maps that are not
// linear the hook would come too early, and `pass` gathers them afterwards.
template <class Acc, class In, class Hook, class Pass>
PERFORMER_INLINE void LogFeatures(const Map<Acc>& map, const Left<In>& x, int64_t n,
                                  const ProjectionOperands<Acc, In>& projection,
                                  const Strides& strides, Acc* f, Acc* slope, Hook hook,
                                  Pass pass) {
  constexpr auto kDepth = Operands<Acc, In>::Depth;
  if (map.linear()) {
    MatMulPanelsWith(x.data, x.row_stride, n, projection.panels, kDepth(strides.d), strides, f,
                     hook.prefetcher, &hook, projection.feature_scale);
  } else {
    MatMulPanels(x.data, x.row_stride, n, projection.panels, kDepth(strides.d), strides, f,
                 hook.prefetcher, projection.feature_scale);
    ApplyMap(map, n, strides.m_pad, strides.m_stride, f, slope);
    pass();
  }
}

// g[i][m] *= slope[i][m]: the chain rule through the epilogue.
template <class Acc>
PERFORMER_INLINE void ChainSlope(const Map<Acc>& map, int64_t n, const Strides& strides,
                                 const Acc* slope, Acc* g) {
  if (map.linear()) return;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t m = i * strides.m_stride; m < i * strides.m_stride + strides.m_pad;
         m += kLanes<Acc>)
      Store(g + m, Load(g + m) * Load(slope + m));
}

// Features of keys: f[j][m] = 2^(f + offset_j - anchor_m) and, unless mass is nullptr, mass[m] +=
// sum_j f[j][m]. Where the anchor is -inf, f + offset is -inf too.
template <class Acc>
void KeyFeatures(int64_t n, const Strides& strides, const Acc* offset, const Acc* anchor, Acc* f,
                 Acc* mass) {
  for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
    const Vec<Acc> given = Load(anchor + m), zero = {};
    const Vec<Acc> a = given == -kInf<Acc> ? zero : given;
    Vec<Acc> sum = {};
    for (int64_t j = 0; j < n; ++j) {
      const Vec<Acc> y = Exp2(Load(f + j * strides.m_stride + m) + offset[j] - a);
      sum += y;
      Store(f + j * strides.m_stride + m, y);
    }
    if (mass) Store(mass + m, Load(mass + m) + sum);
  }
}

// bias[m] = log2 of the weight of feature m: unit * log_mass, where the unit is 1 in base 2 and
// log2(e) for natural logarithms, and the feature bias; -inf in the padding.
template <class Acc>
void SetBias(const Acc* log_mass, double unit, const Acc* feature_bias, const Strides& strides,
             Acc* bias) {
  for (int64_t m = 0; m < strides.m_pad; ++m)
    bias[m] = m < strides.m ? static_cast<Acc>(unit * static_cast<double>(log_mass[m]) +
                                               kLog2eDouble * static_cast<double>(feature_bias[m]))
                            : -kInf<Acc>;
}

// bias[m] = feature_bias[m] in base 2, -inf in the padding.
template <class Acc>
void SetFeatureBias(const Acc* feature_bias, const Strides& strides, Acc* bias) {
  for (int64_t m = 0; m < strides.m_pad; ++m)
    bias[m] = m < strides.m ? kLog2e<Acc> * feature_bias[m] : -kInf<Acc>;
}

// 1 / den, and 0 for a row that sees no key, whose den is 0.
template <class Acc>
PERFORMER_INLINE Acc Inverse(Acc den) {
  return den == 0 ? Acc(0) : 1 / den;
}

// x[n][width] /= den of the row; exactly 0 where den is, whatever x holds.
template <class Acc>
PERFORMER_INLINE void ScaleRows(int64_t n, int64_t width, const Acc* den, Acc* x) {
  for (int64_t i = 0; i < n; ++i) {
    const Acc inverse = Inverse(den[i]);
    for (int64_t e = i * width; e < (i + 1) * width; e += kLanes<Acc>)
      Store(x + e, inverse == 0 ? Vec<Acc>{} : Load(x + e) * inverse);
  }
}

PERFORMER_ISA_END
