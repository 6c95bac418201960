// Queries of a steep sub-chunk (key_chain.h). With a and b the log-features of a query and of a key:
//   weight[i][m] = 2^(anchor[m] + a[i][m] - shift_i)          of the state before the sub-chunk
//   scores[i][j] = sum_m 2^(b[m][j] + a[i][m] - shift_i)      of each key j <= i
// where shift_i is the maximum of anchor + a and of all b + a of the row, as they are rounded, so
// that the largest power is 1. Most of the other powers are nearly 0, as each key outweighs those before: powers below
// 2^kLeastExponent count as 0, and keys that have no others cost nothing.
#pragma once
#include "cpu/kernels/causal/key_chain.h"
#include "cpu/kernels/query_chunk.h"

PERFORMER_ISA_BEGIN

// Whether a lane is not 0.
template <class Acc>
PERFORMER_INLINE bool Any(IntVec<Acc> x) {
  for (int l = 0; l < kLanes<Acc>; ++l)
    if (x[l]) return true;
  return false;
}

// Row i of a steep sub-chunk. f [m_pad] holds a and becomes weight. scores are written from the
// vector of sub_chunk.begin up to that of the row, with 0 in lanes that are not keys of the row. The
// denominator of the row is returned.
template <class Acc>
Acc SteepRow(const CausalSubChunk<Acc>& sub_chunk, const Strides& strides, int64_t i, Acc* f,
             Acc* scores) {
  constexpr int64_t C = kCausalChunk, kUnroll = 4;
  const Columns<Acc> keys(sub_chunk.begin, sub_chunk.begin + i + 1);
  const Acc* b = sub_chunk.key_features;
  const Vec<Acc> none = Splat(-kInf<Acc>), zero = {};
  Vec<Acc> highest_of_row = none;
  for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>)
    highest_of_row = Max(Load(f + m) + Load(sub_chunk.anchor + m), highest_of_row);
  // The largest b + a of each key; NaN, which must show, where one of them is.
  keys.ForEach([&](int64_t j, IntVec<Acc> inside) {
    Vec<Acc> highest[kUnroll] = {none, none, none, none};
    IntVec<Acc> is_nan = {};
    const auto add = [&](int64_t m, Vec<Acc>& into) PERFORMER_TILE_BODY {
      const Vec<Acc> x = Load(b + m * C + j) + f[m];
      is_nan |= x != x;
      into = Max(x, into);
    };
    int64_t m = 0;
    for (; m + kUnroll <= strides.m; m += kUnroll) PERFORMER_UNROLL
    for (int64_t u = 0; u < kUnroll; ++u) add(m + u, highest[u]);
    for (; m < strides.m; ++m) add(m, highest[0]);
    const Vec<Acc> most = Max(Max(highest[0], highest[1]), Max(highest[2], highest[3]));
    highest_of_row = inside ? Max(most, highest_of_row) : highest_of_row;
    Store(scores + j, is_nan ? Splat(kInf<Acc>) : most);
  });
  Acc shift = ReduceMax<Acc>(highest_of_row);
  if (shift == -kInf<Acc>) shift = 0;

  Vec<Acc> sum = {};
  keys.ForEach([&](int64_t j, IntVec<Acc> inside) {
    Vec<Acc> weight = {};
    if (Any<Acc>(inside & ~(Load(scores + j) < shift + kLeastExponent<Acc>)))
      for (int64_t m = 0; m < strides.m; ++m)
        weight += Exp2Normal<Acc>(Load(b + m * C + j) + f[m] - shift);
    weight = inside ? weight : zero;
    Store(scores + j, weight);
    sum += weight;
  });
  for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>)
    Store(f + m, Exp2Normal<Acc>(Load(sub_chunk.anchor + m) + Load(f + m) - shift));
  for (int64_t m = strides.m; m < strides.m_pad; ++m) f[m] = 0;
  return ReduceAdd<Acc>(sum) + Dot(f, sub_chunk.mass, strides.m_pad);
}

// f, den and scores [rows][score_stride] of the queries of a steep sub-chunk.
template <class Acc>
void SteepQueries(const Map<Acc>& map, const Strides& strides, const QueryHead<Acc>& head,
                  const CausalSubChunk<Acc>& sub_chunk, QueryChunk<Acc>& queries, Acc* scores,
                  int64_t score_stride, Prefetcher* prefetcher) {
  LogFeatures<Acc>(map, queries.q, sub_chunk.rows, head.projection.panels, strides, queries.f,
                   nullptr, prefetcher);
  SetFeatureBias(head.feature_bias, strides, queries.bias);
  for (int64_t i = 0; i < sub_chunk.rows; ++i) {
    Acc* f = queries.f + i * strides.m_stride;
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>)
      Store(f + m, Load(f + m) + Load(queries.bias + m));
    queries.den[i] = SteepRow(sub_chunk, strides, i, f, scores + i * score_stride);
  }
}

PERFORMER_ISA_END
