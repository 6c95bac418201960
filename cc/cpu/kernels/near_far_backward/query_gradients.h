// The query side of the gradient of near-and-far attention: dq, the gradients of the query
// projection and the feature bias, delta of each row, and what near queries give to keys.
#pragma once
#include "cpu/kernels/near_far_backward/gradient.h"
#include "cpu/kernels/near_far_backward/reverse_states.h"

PERFORMER_ISA_BEGIN

// Replaces the logits of row r by normalised weights.
template <class Acc>
void NormalisedWeights(NearFarGradient<Acc>& gradient, const NearFarContext<Acc>& context,
                       const QueryRows& rows, int64_t r) {
  const QueryLogits<Acc>& s = gradient.queries;
  Acc *near = s.Near(r), *far = s.Far(r);
  const Acc lse = gradient.lse[r], far_lse = lse + s.norm[r];
  ForNearLogits(context, rows, s, r,
                [&](int64_t c, Vec<Acc> x) PERFORMER_TILE_BODY { Store(near + c, Exp2(x - lse)); });
  for (int64_t m = 0; context.has_far && m < context.strides.m_pad; m += kLanes<Acc>)
    Store(far + m, Exp2(Load(far + m) + Load(s.far_bias + m) - far_lse));
}

// Calls visit(column) for every vector of near columns that row r of the chunk uses.
template <class Acc, class Visit>
PERFORMER_INLINE void ForNearColumns(const NearFarContext<Acc>& context, const QueryRows& rows,
                                     int64_t r, Visit visit) {
  for (int b = 0; b < context.near.count; ++b) {
    const int64_t first = context.near.column[b];
    const int64_t seen = context.IsTriangle(b) ? rows.at + r + 1 : context.near.block[b]->columns();
    for (int64_t c = first; c < first + seen; c += kLanes<Acc>) visit(c);
  }
}

// Replaces g = dout . (value of each term) of row r by the gradients of its logits, those of scores
// times the scale; returns the sum of those of log-features.
template <class Acc>
Acc RowLogitGradient(NearFarGradient<Acc>& gradient, const NearFarContext<Acc>& context,
                     const QueryRows& rows, int64_t r, Acc grad_log_weight, const Acc* mass,
                     Acc* feature_bias) {
  const QueryLogits<Acc>& s = gradient.queries;
  const Acc *near = s.Near(r), *far = s.Far(r);
  Acc *near_g = gradient.g + r * s.stride, *far_g = near_g + s.near_columns;
  const int64_t m_pad = context.has_far ? context.strides.m_pad : 0;
  const Vec<Acc> zero = {};
  for (int b = 0; b < context.near.count; ++b) {
    if (!context.IsTriangle(b)) continue;  // later keys may hold anything
    Acc* last = near_g + context.near.column[b];
    for (int64_t c = rows.at + r + 1; c < RoundUp(rows.at + r + 1, kLanes<Acc>); ++c) last[c] = 0;
  }
  Vec<Acc> sum = {};
  ForNearColumns(context, rows, r,
                 [&](int64_t c) PERFORMER_TILE_BODY { sum += Load(near + c) * Load(near_g + c); });
  for (int64_t m = 0; m < m_pad; m += kLanes<Acc>) sum += Load(far + m) * Load(far_g + m);
  const bool sees = gradient.lse[r] != kInf<Acc>;
  const Acc delta = sees ? ReduceAdd<Acc>(sum) - grad_log_weight : Acc(0);
  gradient.chunk_delta[r] = delta;
  ForNearColumns(context, rows, r, [&](int64_t c) PERFORMER_TILE_BODY {
    const Vec<Acc> weight = Load(near + c);
    const Vec<Acc> ds = weight == Acc(0) ? zero : weight * (Load(near_g + c) - delta);
    Store(gradient.column_sum + c, Load(gradient.column_sum + c) + ds);
    Store(near_g + c, ds * context.map.scale);
  });
  Vec<Acc> far_sum = {};
  for (int64_t m = 0; m < m_pad; m += kLanes<Acc>) {
    const Vec<Acc> da = Load(far + m) * (Load(far_g + m) - delta * Load(mass + m));
    far_sum += da;
    Store(feature_bias + m, Load(feature_bias + m) + da);
    Store(far_g + m, da);
  }
  return ReduceAdd<Acc>(far_sum);
}

// dq of a chunk from g, whose far rows sum to far_sum.
template <class Acc>
void StoreQueryGradient(NearFarGradient<Acc>& gradient, const NearFarContext<Acc>& context,
                        const QueryRows& rows, const QueryHead<Acc>& head, int64_t i,
                        const Acc* far_sum) {
  const QueryLogits<Acc>& s = gradient.queries;
  const Strides& strides = gradient.strides;
  Spans<Acc> spans;
  if (context.has_far) spans.Add(s.near_columns, head.projection.rows.data, strides.m, false);
  for (int b = 0; b < context.near.count; ++b)
    spans.Add(context.near.column[b], context.near.block[b]->keys.k, context.Whole(b, rows),
              context.IsTriangle(b));
  SpanProduct<Acc>(gradient.g, s.stride, spans, nullptr, gradient.dq, strides.d_pad, rows.n,
                   strides.d_pad);
  for (int64_t r = 0; context.has_far && context.query_norm && r < rows.n; ++r) {
    const Acc norm = context.map.scale * far_sum[r];
    for (int64_t d = r * strides.d_pad; d < (r + 1) * strides.d_pad; d += kLanes<Acc>)
      Store(gradient.dq + d, Load(gradient.dq + d) - Load(s.q + d) * norm);
  }
  StoreRows<Acc>({gradient.params.grad_queries.query, gradient.params.dtype, gradient.dims.heads,
                  gradient.FirstHead() + i, strides.d},
                 rows.row, rows.n, gradient.dq, strides.d_pad);
}

// Adds what a chunk of queries gives to its near keys.
template <class Acc>
void AddNearKeyGradients(NearFarGradient<Acc>& gradient, const NearFarContext<Acc>& context,
                         const QueryRows& rows) {
  const QueryLogits<Acc>& s = gradient.queries;
  const Strides& strides = gradient.strides;
  for (int b = 0; b < context.near.count; ++b) {
    const int64_t key = context.near.block[b]->row - gradient.range.begin;
    const int64_t column = context.near.column[b], whole = context.Whole(b, rows);
    AddTransposedProduct(gradient.g + column, s.stride, rows.n, whole, context.IsTriangle(b), s.q,
                         gradient.near_dk + key * strides.d_pad, strides.d_pad);
    AddTransposedProduct(s.logits + column, s.stride, rows.n, whole, context.IsTriangle(b),
                         gradient.y, gradient.near_dv + key * strides.e_pad, strides.e_pad);
    const int64_t seen = whole + (context.IsTriangle(b) ? rows.n : 0);
    for (int64_t j = 0; j < seen; ++j)
      gradient.near_dbias[key + j] += gradient.column_sum[column + j];
  }
}

// The queries of a block, of query head i of the group. `state` is that of their far keys, whose
// transposed sums lie in sum_panels. What they give to far keys is added to `reverse`, if it is
// there: relative to the anchors of `state`.
template <class Acc>
void QueryGradientsOfHead(NearFarGradient<Acc>& gradient, int64_t block,
                          const NearFarContext<Acc>& context, const SummaryPartial<Acc>& state,
                          int64_t i, const SummaryPartial<Acc>* reverse) {
  QueryLogits<Acc>& s = gradient.queries;
  const Strides& strides = gradient.strides;
  const QueryHead<Acc> head = gradient.Head(i);
  Acc far_sum[kNearFarChunk];
  SetFarBias(state.anchor, head.feature_bias, strides, s.far_bias);
  gradient.ForQueries(block, s.chunk, [&](const QueryRows& rows) {
    gradient.LoadQueries(rows, i);
    ComputeLogits(context, rows, {s.q, strides.d_pad, 1}, head.projection, s, &gradient.prefetcher);
    const Left<Acc> y = {gradient.y, strides.e_pad, 1};
    NearProducts(
        context, rows, y, strides.e_pad,
        [](const KeyBlock<Acc>& block) { return block.value_panels; },
        context.has_far ? HookCalls<Acc>(rows.n, strides.e_pad, strides.m_pad) : 0, gradient.g,
        s.stride, &gradient.prefetcher);
    if (context.has_far)
      MatMulPanels(y.data, y.row_stride, rows.n, gradient.sum_panels, strides.e_pad, s.joint,
                   gradient.g + s.near_columns, &gradient.prefetcher);
    for (int64_t c = 0; c < s.near_columns; ++c) gradient.column_sum[c] = 0;
    const Acc* grad_log_weight = static_cast<const Acc*>(gradient.params.grad_log_weight) +
                                 rows.row * gradient.dims.heads + gradient.FirstHead() + i;
    for (int64_t r = 0; r < rows.n; ++r) {
      NormalisedWeights(gradient, context, rows, r);
      far_sum[r] =
          RowLogitGradient(gradient, context, rows, r, grad_log_weight[r * gradient.dims.heads],
                           state.mass, gradient.partial.feature_bias + i * strides.m_pad);
      gradient.Delta(i, rows)[r] = gradient.chunk_delta[r];
    }
    StoreQueryGradient(gradient, context, rows, head, i, far_sum);
    AddNearKeyGradients(gradient, context, rows);
    if (!context.has_far) return;
    if (gradient.params.attributes.projection_gradient)
      MatMul<true>(gradient.g + s.near_columns, 1, s.stride, s.q, strides.d_pad, rows.n,
                   gradient.partial.query_projection + i * strides.m * strides.d_pad, strides.d_pad,
                   strides.m, strides.d_pad);
    if (reverse) AddToReverseState(gradient, rows, gradient.chunk_delta, *reverse);
  });
}

template <class Acc>
void QueryGradients(NearFarGradient<Acc>& gradient, int64_t block, const SummaryPartial<Acc>& state,
                    const SummaryPartial<Acc>* reverse) {
  const Strides& strides = gradient.strides;
  const NearKeys<Acc> near = gradient.Near(block);
  const NearFarContext<Acc> context = gradient.Context(near, state);
  gradient.queries.SetNearBias(near);
  if (context.has_far)
    TransposeToPanels(state.sum, strides.m, strides.e_pad, strides.e_pad, gradient.sum_panels);
  for (int64_t i = 0; i < GroupSize(gradient.dims); ++i)
    QueryGradientsOfHead(gradient, block, context, state, i, reverse);
}

PERFORMER_ISA_END
