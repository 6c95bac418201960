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
void ComputeColumnMax(int64_t n, const Strides& strides, const Acc* offset, const Acc* f,
                      Acc* column_max) {
  for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
    Vec<Acc> top = Load(column_max + m);
    for (int64_t j = 0; j < n; ++j) top = Max(Load(f + j * strides.m_stride + m) + offset[j], top);
    Store(column_max + m, top);
  }
}

// Raises the anchors to `tops`; sums are relative to them. If `first`, nothing has been summed yet.
template <class Acc>
void RaiseAnchors(const Strides& strides, const Acc* column_max, bool first,
                  SummaryPartial<Acc> to) {
  for (int64_t m0 = 0; m0 < strides.m; m0 += kLanes<Acc>) {
    const Vec<Acc> before = Load(to.anchor + m0), top = Load(column_max + m0);
    Store(to.anchor + m0, top);
    if (first) continue;
    const IntVec<Acc> raised = top > before;
    const Vec<Acc> keep = Exp2(before - top);  // 0 where the anchor was -inf
    for (int64_t m = m0; m < m0 + kLanes<Acc> && m < strides.m; ++m) {
      if (!raised[m - m0]) continue;
      Acc* sum = to.sum + m * strides.e_pad;
      for (int64_t e = 0; e < strides.e_pad; e += kLanes<Acc>)
        Store(sum + e, Load(sum + e) * keep[m - m0]);
      to.mass[m] *= keep[m - m0];
    }
  }
}

template <class Acc, class In>
struct SummarizeScratch {
  KeyChunk<Acc> keys;
  Acc *f, *column_max;  // [chunk][m_stride], [m_pad]: the maxima so far
  In *k_operand, *v_operand, *f_operand;

  void Place(Arena& arena, const Strides& strides, int64_t chunk) {
    const auto take = [&](int64_t numbers) {
      return arena.Take<In>(Operands<Acc, In>::Size(numbers));
    };
    k_operand = take(chunk * strides.d_pad);
    v_operand = take(chunk * strides.e_pad);
    f_operand = take(chunk * strides.m_stride);
    keys.Place(arena, strides, chunk);
    f = arena.Take<Acc>(chunk * strides.m_stride);
    column_max = arena.Take<Acc>(strides.m_pad);
  }
};

template <class Acc, class In>
bool Summarize(const SummarizeParams& params, const Acc* projection, WorkRange range,
               SummaryPartial<Acc> partial) {
  const Strides strides = MakeStrides<Acc>(params.dims);
  const Map<Acc> map(params);
  const int64_t rows = range.end - range.begin,
                chunk = rows < kSummarizeChunk ? rows : kSummarizeChunk;
  Arena arena;
  using Operand = Operands<Acc, In>;
  SummarizeScratch<Acc, In> s;
  s.Place(arena, strides, chunk);
  if (!arena.Allocate()) return false;
  s.Place(arena, strides, chunk);
  const int64_t index = params.keys.projection_heads == 1 ? 0 : range.head;
  const auto weights = Operand::Projection(
      params.attributes, projection + index * PackedProjection<Acc>::Size(strides), strides);

  for (int64_t m = 0; m < strides.m_pad; ++m)
    partial.anchor[m] = s.column_max[m] = -kInf<Acc>, partial.mass[m] = 0;
  const ConstRows keys = KeyChunk<Acc>::Keys(params, params.keys, range);
  const ConstRows values = KeyChunk<Acc>::Values(params, params.keys, range);
  bool first = true;
  Prefetcher prefetcher;
  for (int64_t row = range.begin; row < range.end; row += chunk) {
    const int64_t n = range.end - row < chunk ? range.end - row : chunk;
    s.keys.LoadBias(params, params.keys, range, row, n);
    if (!s.keys.any) continue;
    const Left<In> k =
        LoadKeys(keys, row, n, map, strides.d_pad, &s.keys, s.k_operand, &prefetcher);
    const Right<In> v = Operand::StackOf(values, row, n, s.keys.skip, strides.e_pad, s.keys.v,
                                         s.v_operand, &prefetcher);
    LogFeatures<Acc>(map, k, n, weights, strides, s.f, nullptr,
                     ColumnMaxima<Acc>{&prefetcher, s.keys.offset, s.column_max},
                     [&] { ComputeColumnMax(n, strides, s.keys.offset, s.f, s.column_max); });
    RaiseAnchors(strides, s.column_max, first, partial);
    KeyFeatures(n, strides, s.keys.offset, partial.anchor, s.f, partial.mass);
    const Left<In> f = Operand::Columns(s.f, n, strides.m_pad, strides.m_stride, s.f_operand);
    if (first) {
      Product<false>(f, v, n, partial.sum, strides.e_pad, strides.m, strides.e_pad);
    } else {
      Product<true>(f, v, n, partial.sum, strides.e_pad, strides.m, strides.e_pad);
    }
    first = false;
  }
  for (int64_t i = 0; first && i < strides.m * strides.e_pad; ++i) partial.sum[i] = 0;
  return true;
}

PERFORMER_ISA_END
