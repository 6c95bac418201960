// Layouts that the drivers share with the kernels of every instruction set. Acc is the type of sums
// and of the state: float or double.
#pragma once
#include <cstdint>

#include "core/indices.h"
#include "core/inline.h"
#include "core/params.h"

namespace performer {
namespace cpu {

inline constexpr int64_t kAlignment = 64;  // bytes: a cache line, the widest vector
// A right operand with one column for each feature is stored as panels, blocks of kPanel features:
// [m_panels][depth][kPanel].
inline constexpr int64_t kPanel = 64;

// Rows in scratch memory are padded to a multiple of this.
template <class Acc>
constexpr int64_t kPad = kAlignment / static_cast<int64_t>(sizeof(Acc));

// Sizes of a call, and strides of rows in scratch memory: rows are padded with zeros to whole
// vectors.
struct Strides {
  int64_t d, e, m;              // key dim, value dim and features, as in the call
  int64_t d_pad, e_pad, m_pad;  // the same, padded
  int64_t m_panels;             // number of panels that hold m features
  // Of rows of features: one vector more than m_pad, which spreads the rows over all cache sets.
  int64_t m_stride;
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

// One projection w [M, D], prepared for the products and times sqrt(scale). The softmax map works
// in base 2.
template <class Acc>
struct PackedProjection {
  const Acc* panels = nullptr;      // [m_panels][d][kPanel]: w^T, times log2(e) for the softmax map
  const Acc* rows = nullptr;        // [m][d_pad]: w
  const Acc* base2_rows = nullptr;  // [m][d_pad]: w, times log2(e) for the softmax map

  // Other forms of a projection (packed_operands.h) fit in the same memory.
  static PERFORMER_INLINE constexpr int64_t Size(const Strides& strides) {
    return strides.m_panels * kPanel * (strides.d + 2 * strides.d_pad);
  }
  static PERFORMER_INLINE PackedProjection At(const Acc* base, const Strides& strides) {
    const Acc* rows = base + strides.m_panels * kPanel * strides.d;
    return {base, rows, rows + strides.m * strides.d_pad};
  }
};

// Partial results of one work item, in memory of the driver. Each starts on a cache line.

// The state of some keys: sums relative to 2^anchor. An anchor, the running reference maximum of a
// feature's log-features, is -inf as long as the feature has seen no key.
template <class Acc>
struct SummaryPartial {
  Acc* anchor;  // [m_pad]
  Acc* mass;    // [m_pad]
  Acc* sum;     // [m][e_pad]

  static PERFORMER_INLINE constexpr int64_t Size(const Strides& strides) {
    return 2 * strides.m_pad + strides.m * strides.e_pad;
  }
  static PERFORMER_INLINE SummaryPartial At(Acc* base, const Strides& strides) {
    return {base, base + strides.m_pad, base + 2 * strides.m_pad};
  }
};

template <class Acc>
struct ReadGradPartial {
  Acc* log_mass;    // [m_pad]; also the gradient of the feature bias
  Acc* mean;        // [m][e_pad]
  Acc* projection;  // [m][d_pad], divided by sqrt(scale)

  static PERFORMER_INLINE constexpr int64_t Size(const Strides& strides) {
    return strides.m_pad + strides.m * (strides.e_pad + strides.d_pad);
  }
  static PERFORMER_INLINE ReadGradPartial At(Acc* base, const Strides& strides) {
    return {base, base + strides.m_pad, base + strides.m_pad + strides.m * strides.e_pad};
  }
};

// Gradients of one key/value head and of the group of query heads that share it.
template <class Acc>
struct CausalGradPartial {
  Acc* log_mass;          // [m_pad], of the initial state
  Acc* mean;              // [m][e_pad], of the initial state
  Acc* key_projection;    // [m][d_pad], divided by sqrt(scale)
  Acc* feature_bias;      // [group_size][m_pad]
  Acc* query_projection;  // [group_size][m][d_pad], divided by sqrt(scale)

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

// Number of query heads that share a key/value head; these heads are its group.
PERFORMER_INLINE int64_t GroupSize(const Dims& dims) { return dims.heads / dims.groups; }

// Index of query head `head` in a tensor with `count` heads: 1, G or H.
PERFORMER_INLINE int64_t QueryHeadIndex(int64_t count, int64_t head, const Dims& dims) {
  return performer::QueryHeadIndex(count, head, dims.heads, head / GroupSize(dims));
}

// Index of key/value head `head` in a tensor with `count` heads: 1 or G.
PERFORMER_INLINE int64_t KeyHeadIndex(int64_t count, int64_t head) { return count == 1 ? 0 : head; }

// A work item: rows [begin, end) of one sequence and one head. Rows are counted through the whole
// tensor, [B * L].
struct WorkRange {
  int64_t sequence, head, begin, end;
};

}  // namespace cpu
}  // namespace performer
