// Layouts shared by the drivers and the kernels of every instruction set. Acc is the type of sums
// and state: float or double.
#pragma once
#include <cstdint>

#include "core/indices.h"
#include "core/inline.h"
#include "core/params.h"

namespace performer {
namespace cpu {

inline constexpr int64_t kAlignment = 64;  // bytes: a cache line, the widest vector
inline constexpr int64_t kPanel =
    64;  // columns of a panel: B operands of features lie as panels [depth][kPanel]

template <class Acc>
constexpr int64_t kPad = kAlignment / static_cast<int64_t>(sizeof(Acc));

// Strides of rows in scratch memory: padded to whole vectors, the padding is zero.
struct Strides {
  int64_t d, e, m;              // as in the call
  int64_t d_pad, e_pad, m_pad;  // of padded rows
  int64_t m_panels;             // panels that hold m columns
  int64_t m_stride;  // of rows of features: one vector more than m_pad, spreads them over all cache
                     // sets
};

template <class Acc>
PERFORMER_INLINE constexpr Strides MakeStrides(const Dims& dims) {
  constexpr int64_t kUnit = kPad<Acc>;
  const int64_t m_pad = RoundUp(dims.features, kUnit);
  return {dims.key_dim,
          dims.value_dim,
          dims.features,
          RoundUp(dims.key_dim, kUnit),
          RoundUp(dims.value_dim, kUnit),
          m_pad,
          RoundUp(dims.features, kPanel) / kPanel,
          m_pad + kUnit};
}

// One projection [M, D] prepared for the products, times sqrt(scale); the softmax map works in
// base 2.
template <class Acc>
struct PackedProjection {
  const Acc* panels = nullptr;      // [m_panels][d][kPanel]: w^T, times log2(e) for the softmax map
  const Acc* rows = nullptr;        // [m][d_pad]: w
  const Acc* base2_rows = nullptr;  // [m][d_pad]: w, times log2(e) for the softmax map

  static PERFORMER_INLINE constexpr int64_t Size(const Strides& strides) {
    return strides.m_panels * kPanel * strides.d + 2 * strides.m * strides.d_pad;
  }
  static PERFORMER_INLINE PackedProjection At(const Acc* base, const Strides& strides) {
    const Acc* rows = base + strides.m_panels * kPanel * strides.d;
    return {base, rows, rows + strides.m * strides.d_pad};
  }
};

// Partial results of one work item, in memory of the driver. Each starts on a cache line.
template <class Acc>
struct SummaryPartial {      // sums relative to 2^anchor
  Acc *anchor, *mass, *sum;  // [m_pad], [m_pad], [m][e_pad]; anchor -inf: nothing yet
  static PERFORMER_INLINE constexpr int64_t Size(const Strides& strides) {
    return 2 * strides.m_pad + strides.m * strides.e_pad;
  }
  static PERFORMER_INLINE SummaryPartial At(Acc* base, const Strides& strides) {
    return {base, base + strides.m_pad, base + 2 * strides.m_pad};
  }
};
template <class Acc>
struct ReadGradPartial {
  Acc *log_mass, *mean, *projection;  // [m_pad] (also the gradient of feature_bias), [m][e_pad],
                                      // [m][d_pad] / sqrt(scale)
  static PERFORMER_INLINE constexpr int64_t Size(const Strides& strides) {
    return strides.m_pad + strides.m * (strides.e_pad + strides.d_pad);
  }
  static PERFORMER_INLINE ReadGradPartial At(Acc* base, const Strides& strides) {
    return {base, base + strides.m_pad, base + strides.m_pad + strides.m * strides.e_pad};
  }
};
template <class Acc>
struct CausalGradPartial {
  Acc *log_mass, *mean,
      *key_projection;  // of the initial state [m_pad], [m][e_pad]; [m][d_pad] / sqrt(scale)
  Acc *feature_bias, *query_projection;  // [heads of the group][m_pad], [heads of the
                                         // group][m][d_pad] / sqrt(scale)
  static PERFORMER_INLINE constexpr int64_t Size(const Strides& strides, int64_t group_size) {
    return strides.m_pad + strides.m * (strides.e_pad + strides.d_pad) +
           group_size * (strides.m_pad + strides.m * strides.d_pad);
  }
  static PERFORMER_INLINE CausalGradPartial At(Acc* base, const Strides& strides,
                                               int64_t group_size) {
    Acc* mean = base + strides.m_pad;
    Acc* key_projection = mean + strides.m * strides.e_pad;
    Acc* feature_bias = key_projection + strides.m * strides.d_pad;
    return {base, mean, key_projection, feature_bias, feature_bias + group_size * strides.m_pad};
  }
};

// Query heads that share a key/value head.
PERFORMER_INLINE int64_t GroupSize(const Dims& dims) { return dims.heads / dims.groups; }

// Index of query head `head` in a tensor with `count` heads: 1, G or H.
PERFORMER_INLINE int64_t QueryHeadIndex(int64_t count, int64_t head, const Dims& dims) {
  return performer::QueryHeadIndex(count, head, dims.heads, head / GroupSize(dims));
}

// A work item: rows [begin, end) of one sequence and one head, rows counted through the whole
// tensor [B * L].
struct WorkRange {
  int64_t sequence, head, begin, end;
};

}  // namespace cpu
}  // namespace performer
