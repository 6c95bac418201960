// Bidirectional attention, first half: keys and values to a state of M features.
//   log_mass[m] = log sum_j exp(b[m, j])      mean[m] = softmax_j(b[m, :]) v
// Per chunk of keys: log-features into a buffer in L2, their maximum raises the anchors,
// exponentials, then sum += f^T v.
#pragma once
#include "core/splits.h"
#include "cpu/memory/packed_operands.h"

PERFORMER_ISA_BEGIN

// tops[m] = the maximum of itself and the log-features.
template <class Acc>
void ColumnTops(int64_t n, const Widths& w, const Acc* offset, const Acc* f, Acc* tops) {
  for (int64_t m = 0; m < w.m_pad; m += kLanes<Acc>) {
    Vec<Acc> top = Load(tops + m);
    for (int64_t j = 0; j < n; ++j) top = Max(Load(f + j * w.m_stride + m) + offset[j], top);
    Store(tops + m, top);
  }
}

// Raises the anchors to `tops`; sums are relative to them. If `first`, nothing has been summed yet.
template <class Acc>
void RaiseAnchors(const Widths& w, const Acc* tops, bool first, SummaryPartial<Acc> to) {
  for (int64_t m0 = 0; m0 < w.m; m0 += kLanes<Acc>) {
    const Vec<Acc> before = Load(to.anchor + m0), top = Load(tops + m0);
    Store(to.anchor + m0, top);
    if (first) continue;
    const IntVec<Acc> raised = top > before;
    const Vec<Acc> keep = Exp2(before - top);  // 0 where the anchor was -inf
    for (int64_t m = m0; m < m0 + kLanes<Acc> && m < w.m; ++m) {
      if (!raised[m - m0]) continue;
      Acc* sum = to.sum + m * w.e_pad;
      for (int64_t e = 0; e < w.e_pad; e += kLanes<Acc>)
        Store(sum + e, Load(sum + e) * keep[m - m0]);
      to.mass[m] *= keep[m - m0];
    }
  }
}

template <class Acc, class In>
struct SummarizeScratch {
  KeyChunk<Acc> keys;
  Acc *f, *tops;  // [chunk][m_stride], [m_pad]: the maxima so far
  In *k_operand, *v_operand, *f_operand;

  void Place(Arena& arena, const Widths& w, int64_t chunk) {
    const auto take = [&](int64_t numbers) {
      return arena.Take<In>(Operands<Acc, In>::Size(numbers));
    };
    k_operand = take(chunk * w.d_pad);
    v_operand = take(chunk * w.e_pad);
    f_operand = take(chunk * w.m_stride);
    keys.Place(arena, w, chunk);
    f = arena.Take<Acc>(chunk * w.m_stride);
    tops = arena.Take<Acc>(w.m_pad);
  }
};

template <class Acc, class In>
bool Summarize(const SummarizeParams& params, const Acc* projection, Slice slice,
               SummaryPartial<Acc> partial) {
  const Widths w = MakeWidths<Acc>(params.dims);
  const Map<Acc> map(params);
  const int64_t rows = slice.end - slice.begin,
                chunk = rows < kSummarizeChunk ? rows : kSummarizeChunk;
  Arena arena;
  using Operand = Operands<Acc, In>;
  SummarizeScratch<Acc, In> s;
  s.Place(arena, w, chunk);
  if (!arena.Allocate()) return false;
  s.Place(arena, w, chunk);
  const int64_t index = params.keys.projection_heads == 1 ? 0 : slice.head;
  const auto weights = Operand::Projection(params.attributes,
                                           projection + index * PackedProjection<Acc>::Size(w), w);

  for (int64_t m = 0; m < w.m_pad; ++m)
    partial.anchor[m] = s.tops[m] = -kInf<Acc>, partial.mass[m] = 0;
  const ConstRows keys = KeyChunk<Acc>::Keys(params, params.keys, slice);
  const ConstRows values = KeyChunk<Acc>::Values(params, params.keys, slice);
  bool first = true;
  Ahead ahead;
  for (int64_t row = slice.begin; row < slice.end; row += chunk) {
    const int64_t n = slice.end - row < chunk ? slice.end - row : chunk;
    s.keys.LoadBias(params, params.keys, slice, row, n);
    if (!s.keys.any) continue;
    const Left<In> k = LoadKeys(keys, row, n, map, w.d_pad, &s.keys, s.k_operand, &ahead);
    const Right<In> v =
        Operand::StackOf(values, row, n, s.keys.skip, w.e_pad, s.keys.v, s.v_operand, &ahead);
    LogFeatures<Acc>(map, k, n, weights, w, s.f, nullptr,
                     ColumnMaxima<Acc>{&ahead, s.keys.offset, s.tops},
                     [&] { ColumnTops(n, w, s.keys.offset, s.f, s.tops); });
    RaiseAnchors(w, s.tops, first, partial);
    KeyWeights(n, w, s.keys.offset, partial.anchor, s.f, partial.mass);
    const Left<In> f = Operand::Columns(s.f, n, w.m_pad, w.m_stride, s.f_operand);
    if (first) {
      Product<false>(f, v, n, partial.sum, w.e_pad, w.m, w.e_pad);
    } else {
      Product<true>(f, v, n, partial.sum, w.e_pad, w.m, w.e_pad);
    }
    first = false;
  }
  for (int64_t i = 0; first && i < w.m * w.e_pad; ++i) partial.sum[i] = 0;
  return true;
}

PERFORMER_ISA_END
