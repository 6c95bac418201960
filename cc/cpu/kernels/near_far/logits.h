// The logits of a chunk of queries: scores of near keys, and log-features, whose keys are far. They
// lie side by side in a row, [near columns | m_stride], as they are terms of one softmax.
#pragma once
#include "cpu/kernels/near_far/blocks.h"
#include "cpu/kernels/query_chunk.h"
#include "cpu/simd/spans.h"

PERFORMER_ISA_BEGIN

// Rows of a chunk: fewer where a row of logits is long, so that all of them stay in the cache.
PERFORMER_INLINE int64_t NearFarRows(const Strides& strides, int64_t near_columns) {
  constexpr int64_t kLogits = 1 << 16;
  const int64_t fit = kLogits / (near_columns + strides.m_stride) / kTileRows * kTileRows;
  return fit < kTileRows ? kTileRows : fit < kNearFarChunk ? fit : kNearFarChunk;
}

// The log2 weights of the features: anchors [m_pad] of a state, the feature bias, and 1 / M.
template <class Acc>
void SetFarBias(const Acc* anchor, const Acc* feature_bias, const Strides& strides, Acc* far_bias) {
  SetBias(anchor, 1.0, feature_bias, strides, far_bias);
  const Acc log_features = static_cast<Acc>(__builtin_log2(static_cast<double>(strides.m)));
  for (int64_t m = 0; m < strides.m_pad; ++m) far_bias[m] -= log_features;
}

template <class Acc>
struct QueryLogits {
  Acc* q;          // [chunk][d_pad], a copy for types and widths that need one
  Acc* logits;     // [chunk][stride]
  Acc* near_bias;  // [near_columns]
  Acc* far_bias;   // [m_pad]
  Acc* row_max;    // [chunk][kLanes]: the maximum of the log-features of a row is that of its lanes
  Acc* norm;       // [chunk]: what is subtracted from the log-features of a row
  int64_t chunk, near_columns, stride;
  Strides joint;  // as Strides, for rows of logits

  void SetPointers(Arena& arena, const Strides& strides, const Blocks& blocks, int near_blocks) {
    near_columns = near_blocks * RoundUp(blocks.MaxRows(), kPad<Acc>);
    chunk = NearFarRows(strides, near_columns);
    chunk = blocks.MaxRows() < chunk ? blocks.MaxRows() : chunk;
    joint = strides;
    joint.m_stride = stride = near_columns + strides.m_stride;
    q = arena.Take<Acc>(chunk * strides.d_pad);
    logits = arena.Take<Acc>(chunk * stride);
    near_bias = arena.Take<Acc>(near_columns);
    far_bias = arena.Take<Acc>(strides.m_pad);
    row_max = arena.Take<Acc>(chunk * kLanes<Acc>);
    norm = arena.Take<Acc>(chunk);
  }
  Acc* Near(int64_t i) const { return logits + i * stride; }
  Acc* Far(int64_t i) const { return logits + i * stride + near_columns; }

  void SetNearBias(const NearKeys<Acc>& near) {
    for (int b = 0; b < near.count; ++b)
      for (int64_t j = 0; j < near.block[b]->columns(); ++j)
        near_bias[near.column[b] + j] = near.block[b]->bias[j];
  }
};

// What the logits of a block of queries depend on, besides the queries.
template <class Acc>
struct NearFarContext {
  const Map<Acc>& map;
  const Strides& strides;
  const NearKeys<Acc>& near;
  bool causal, query_norm;
  bool has_far;  // whether any far key has been seen

  // The keys of block b of `near` that every query of the chunk sees, and whether the chunk's own
  // keys come after them, of which row r sees r + 1.
  int64_t Whole(int b, const QueryRows& rows) const {
    return IsTriangle(b) ? rows.at : near.block[b]->rows;
  }
  bool IsTriangle(int b) const { return causal && b == near.count - 1; }
  // The columns of block b that any query of the chunk sees, padded.
  int64_t Columns(int b, const QueryRows& rows) const {
    return IsTriangle(b) ? RoundUp(rows.at + rows.n, kLanes<Acc>) : near.block[b]->columns();
  }
};

// Products of x [n][depth] with the panels of each near block, side by side in rows of `to`. The
// prefetcher works meanwhile, and keeps a share of its work for `more` calls.
template <class Acc, class Panels>
void NearProducts(const NearFarContext<Acc>& context, const QueryRows& rows, const Left<Acc>& x,
                  int64_t depth, Panels panels, int64_t more, Acc* to, int64_t stride,
                  Prefetcher* prefetcher) {
  int64_t calls = more;
  for (int b = 0; b < context.near.count; ++b)
    calls += HookCalls<Acc>(rows.n, depth, context.Columns(b, rows));
  prefetcher->Divide(calls);
  for (int b = 0; b < context.near.count; ++b) {
    const int64_t columns = context.Columns(b, rows);
    for (int64_t c = 0; c < columns; c += kPanel)
      MatMul<false>(x.data, x.row_stride, 1, panels(*context.near.block[b]) + c * depth, kPanel,
                    depth, to + context.near.column[b] + c, stride, rows.n,
                    columns - c < kPanel ? columns - c : kPanel, prefetcher);
  }
}

// The logits of n queries q, in base 2 and without the norm; the log-features without far_bias,
// whose maxima with it are gathered in row_max. Scores that a row does not see are -inf, up to the
// last column that it needs.
template <class Acc>
void ComputeLogits(const NearFarContext<Acc>& context, const QueryRows& rows, const Left<Acc>& q,
                   const ProjectionOperands<Acc, Acc>& projection, QueryLogits<Acc>& s,
                   Prefetcher* prefetcher) {
  const Strides& strides = context.strides;
  NearProducts(
      context, rows, q, strides.d, [](const KeyBlock<Acc>& block) { return block.panels; },
      context.has_far ? HookCalls<Acc>(rows.n, strides.d, strides.m_pad) : 0, s.Near(0), s.stride,
      prefetcher);
  if (context.has_far)
    QueryLogFeatures(context.map, q, rows.n, projection, s.joint, s.far_bias, s.Far(0),
                     static_cast<Acc*>(nullptr), s.row_max, prefetcher);
  const Acc half = context.query_norm ? kLog2e<Acc> * context.map.scale / 2 : Acc(0);
  for (int64_t i = 0; i < rows.n; ++i)
    s.norm[i] = context.query_norm
                    ? half * SquaredNorm<Acc>(q.data + i * q.row_stride, strides.d_pad)
                    : Acc(0);
}

// {0, 1, 2, ...}
template <class Acc>
PERFORMER_INLINE Vec<Acc> Lanes() {
  Vec<Acc> lanes;
  PERFORMER_UNROLL
  for (int i = 0; i < kLanes<Acc>; ++i) lanes[i] = static_cast<Acc>(i);
  return lanes;
}

// Calls visit(column, x) for every vector of near logits of row i of the chunk, x with the scale and
// the biases; keys after the row's own are -inf.
template <class Acc, class Visit>
PERFORMER_INLINE void ForNearLogits(const NearFarContext<Acc>& context, const QueryRows& rows,
                                    const QueryLogits<Acc>& s, int64_t i, Visit visit) {
  const Acc scale = kLog2e<Acc> * context.map.scale;
  const Acc* row = s.Near(i);
  for (int b = 0; b < context.near.count; ++b) {
    const int64_t first = context.near.column[b];
    const int64_t seen = context.IsTriangle(b) ? rows.at + i + 1 : context.near.block[b]->columns();
    const int64_t whole = seen / kLanes<Acc> * kLanes<Acc>;
    for (int64_t c = first; c < first + whole; c += kLanes<Acc>)
      visit(c, Load(row + c) * scale + Load(s.near_bias + c));
    if (whole == seen) continue;
    const int64_t c = first + whole;
    const IntVec<Acc> hidden = Lanes<Acc>() >= static_cast<Acc>(seen - whole);
    visit(c, hidden ? Splat(-kInf<Acc>) : Load(row + c) * scale + Load(s.near_bias + c));
  }
}

PERFORMER_ISA_END
