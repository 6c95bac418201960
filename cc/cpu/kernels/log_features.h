// Log-features of rows, their weights, and what both sides of the attention share. Everything
// inside is in base 2.
#pragma once
#include <type_traits>

#include "cpu/memory/arena.h"
#include "cpu/memory/layout.h"
#include "cpu/simd/convert.h"
#include "cpu/simd/math.h"
#include "cpu/simd/tile.h"

PERFORMER_ISA_BEGIN

// The feature map of a call with the numbers it needs.
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
  bool linear() const { return kind == FeatureMap::kSoftmax; }
};

// x [m][width], rows `stride` apart, to panels of its transpose [m_panels][width][kPanel], padded
// with zeros: a row stride of m would use a part of the L1 sets.
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

// Writes one [m, d] projection, rounded once to `dtype`, times sqrt(scale), in the layouts of
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

template <class Acc>
PERFORMER_INLINE Acc Dot(const Acc* a, const Acc* b, int64_t n) {
  Vec<Acc> sum = {};
  for (int64_t i = 0; i < n; i += kLanes<Acc>) sum += Load(a + i) * Load(b + i);
  return ReduceAdd<Acc>(sum);
}

// sum_i x_i^2, for a width that is a multiple of the lanes: of x in any type what its copy gives.
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

// Hooks of MatMulPanels: fetch the rows ahead, and gather maxima while the results are in
// registers.
template <class Acc>
struct RowMaxima {
  Prefetcher* prefetcher;
  const Acc* bias;  // [m_pad], added first
  Acc* row_max;     // [n][kLanes]: its lanes' maximum is the row's
  int64_t column = 0;

  PERFORMER_INLINE void Before() { prefetcher->Before(); }
  template <class Tile>
  PERFORMER_INLINE void After(Tile& tile, int64_t r0, int64_t c0) {
    Vec<Acc> added[Tile::kVecs];
    PERFORMER_UNROLL
    for (int j = 0; j < Tile::kVecs; ++j) added[j] = Load(bias + column + c0 + j * kLanes<Acc>);
    PERFORMER_UNROLL
    for (int r = 0; r < Tile::kRows; ++r) {
      Vec<Acc> top = Load(row_max + (r0 + r) * kLanes<Acc>);
      PERFORMER_UNROLL
      for (int j = 0; j < Tile::kVecs; ++j) top = Max(tile.v[r][j] + added[j], top);
      Store(row_max + (r0 + r) * kLanes<Acc>, top);
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
      Vec<Acc> top = Load(to);
      PERFORMER_UNROLL
      for (int r = 0; r < Tile::kRows; ++r)
        top = Max(tile.v[r][j] + offset[r0 + r], top);  // in this order NaN is passed over
      Store(to, top);
    }
  }
};

// c[n][m_pad] = a [n][depth] times panels [m_panels][depth][kPanel]; rows of c are m_stride apart.
// Fetches the rows ahead; hook and scale as in MatMul.
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

// The epilogue of the maps that are not linear: u to log2 phi(u) in place, and slope = d log phi /
// du where asked for.
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

// f[i][m] = log2 phi_m(x_i) without biases and norms; slope (d log phi / du) may be nullptr, and is
// not written for linear maps.
template <class Acc>
PERFORMER_INLINE void LogFeatures(const Map<Acc>& map, const Acc* x, int64_t n, const Acc* panels,
                                  const Strides& strides, Acc* f, Acc* slope,
                                  Prefetcher* prefetcher) {
  MatMulPanels(x, strides.d_pad, n, panels, strides.d, strides, f, prefetcher);
  ApplyMap(map, n, strides.m_pad, strides.m_stride, f, slope);
}

// g[i][m] *= slope[i][m].
template <class Acc>
PERFORMER_INLINE void ChainSlope(const Map<Acc>& map, int64_t n, const Strides& strides,
                                 const Acc* slope, Acc* g) {
  if (map.linear()) return;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t m = i * strides.m_stride; m < i * strides.m_stride + strides.m_pad;
         m += kLanes<Acc>)
      Store(g + m, Load(g + m) * Load(slope + m));
}

// One chunk of keys and values in scratch memory.
template <class Acc>
struct KeyChunk {
  Acc *k, *v, *offset;  // [chunk][d_pad], [chunk][e_pad], [chunk]: what to add to the log-features,
                        // -inf where masked
  uint8_t* skip;        // [chunk]: masked
  bool any, all;        // of the chunk's keys: seen, not masked

  void Place(Arena& arena, const Strides& strides, int64_t chunk) {
    k = arena.Take<Acc>(chunk * strides.d_pad);
    v = arena.Take<Acc>(chunk * strides.e_pad);
    offset = arena.Take<Acc>(chunk);
    skip = arena.Take<uint8_t>(chunk);
  }

  // Rows [row, row + n) of the range's head; masked rows are replaced by 0, whatever they hold.
  void Load(const Common& call, const KeySide& keys, const Map<Acc>& map, const Strides& strides,
            const WorkRange& range, int64_t row, int64_t n, Prefetcher* prefetcher) {
    LoadBias(call, keys, range, row, n);
    LoadRows<Acc>(Keys(call, keys, range), row, n, skip, k, strides.d_pad, prefetcher);
    LoadRows<Acc>(Values(call, keys, range), row, n, skip, v, strides.e_pad, prefetcher);
    FinishOffsets(
        map, n, [&](int64_t j) { return SquaredNorm<Acc>(k + j * strides.d_pad, strides.d_pad); });
  }

  static ConstRows Keys(const Common& call, const KeySide& keys, const WorkRange& range) {
    return {keys.key, call.dtype, call.dims.groups, range.head, call.dims.key_dim};
  }
  static ConstRows Values(const Common& call, const KeySide& keys, const WorkRange& range) {
    return {keys.value, call.dtype, call.dims.groups, range.head, call.dims.value_dim};
  }
  // The key biases, and what they mask.
  void LoadBias(const Common& call, const KeySide& keys, const WorkRange& range, int64_t row,
                int64_t n) {
    const int64_t batch = call.offsets ? 0 : range.sequence;
    const Acc* bias =
        static_cast<const Acc*>(keys.bias) + ((keys.bias_batch == 1 ? 0 : batch) * keys.bias_heads +
                                              (keys.bias_heads == 1 ? 0 : range.head)) *
                                                 keys.bias_length;
    const int64_t first = row - batch * call.dims.keys, step = keys.bias_length == 1 ? 0 : 1;
    any = false, all = true;
    for (int64_t j = 0; j < n; ++j) {
      offset[j] = bias[(first + j) * step];
      skip[j] = offset[j] == -kInf<Acc>;
      any |= !skip[j];
      all &= !skip[j];
    }
  }
  // From biases to offsets: less the norms, in base 2.
  template <class Norm>
  PERFORMER_INLINE void FinishOffsets(const Map<Acc>& map, int64_t n, Norm squared_norm) {
    const Acc half = map.key_norm ? map.scale / 2 : Acc(0);
    for (int64_t j = 0; j < n; ++j)
      offset[j] = kLog2e<Acc> * (offset[j] - (map.key_norm ? half * squared_norm(j) : Acc(0)));
  }
};

// f[j][m] = 2^(f + offset_j - anchor_m) and, if asked for, mass[m] += sum_j; where the anchor is
// -inf, f + offset is -inf too.
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

// bias[m] = log2 of what feature m weighs: the state's log_mass (in base 2, or natural) and the
// feature bias; -inf in the padding.
template <class Acc>
void SetBias(const Acc* log_mass, double unit, const Acc* feature_bias, const Strides& strides,
             Acc* bias) {
  for (int64_t m = 0; m < strides.m_pad; ++m)
    bias[m] = m < strides.m ? static_cast<Acc>(unit * static_cast<double>(log_mass[m]) +
                                               kLog2eDouble * static_cast<double>(feature_bias[m]))
                            : -kInf<Acc>;
}

// tops[i] = lanes whose maximum is that of f[i] + bias.
template <class Acc>
void ComputeRowMax(int64_t n, const Strides& strides, const Acc* bias, const Acc* f, Acc* row_max) {
  for (int64_t i = 0; i < n; ++i, f += strides.m_stride) {
    Vec<Acc> top = Splat(-kInf<Acc>);
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>)
      top = Max(Load(f + m) + Load(bias + m), top);
    Store(row_max + i * kLanes<Acc>, top);
  }
}

// f[i] = 2^(f[i] + bias - shift_i), shift_i the row's maximum (0 if that is -inf), from ComputeRowMax;
// den_i = sum_m f[i][m] * weight[m], or of f alone.
template <bool kWeighted, class Acc>
void QueryFeatures(int64_t n, const Strides& strides, const Acc* bias, const Acc* weight,
                   const Acc* row_max, Acc* f, Acc* shift, Acc* den) {
  for (int64_t i = 0; i < n; ++i, f += strides.m_stride) {
    const Acc highest = ReduceMax<Acc>(Load(row_max + i * kLanes<Acc>));
    shift[i] = highest == -kInf<Acc> ? Acc(0) : highest;
    Vec<Acc> sum = {};
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
      const Vec<Acc> y = Exp2(Load(f + m) + Load(bias + m) - shift[i]);
      Store(f + m, y);
      sum += kWeighted ? y * Load(weight + m) : y;
    }
    den[i] = ReduceAdd<Acc>(sum);
  }
}

// 1 / den; a row that sees no key has den = 0 and gives 0.
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
