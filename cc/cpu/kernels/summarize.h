// Bidirectional attention, first half: keys and values to a state of M features.
//   log_mass[m] = log sum_j exp(b[m, j])      mean[m] = softmax_j(b[m, :]) v
// For each chunk of keys: the log-features b go to a buffer in L2 and their maxima raise the
// anchors; then p = 2^(b - anchor), mass += sum_j p and sum += p^T v. An anchor is the running
// reference maximum of a feature, as in the online softmax.
#pragma once
#include "cpu/chunks.h"
#include "cpu/kernels/key_chunk.h"

PERFORMER_ISA_BEGIN

// column_max[m] = the maximum of itself and of the log-features of feature m.
template <class Acc>
void ComputeColumnMax(int64_t n, const Strides& strides, const Acc* offset, const Acc* f,
                      Acc* column_max) {
  for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
    Vec<Acc> highest = Load(column_max + m);
    for (int64_t j = 0; j < n; ++j)
      highest = Max(Load(f + j * strides.m_stride + m) + offset[j], highest);
    Store(column_max + m, highest);
  }
}

// Raises the anchors to column_max and rescales the sums, which are relative to them. If `first`,
// nothing has been summed yet.
template <class Acc>
void RaiseAnchors(const Strides& strides, const Acc* column_max, bool first,
                  SummaryPartial<Acc> to) {
  for (int64_t m0 = 0; m0 < strides.m; m0 += kLanes<Acc>) {
    const Vec<Acc> before = Load(to.anchor + m0), highest = Load(column_max + m0);
    Store(to.anchor + m0, highest);
    if (first) continue;
    const IntVec<Acc> raised = highest > before;
    const Vec<Acc> keep = Exp2(before - highest);  // 0 where the anchor was -inf
    for (int64_t m = m0; m < m0 + kLanes<Acc> && m < strides.m; ++m) {
      if (!raised[m - m0]) continue;
      Acc* sum = to.sum + m * strides.e_pad;
      for (int64_t e = 0; e < strides.e_pad; e += kLanes<Acc>)
        Store(sum + e, Load(sum + e) * keep[m - m0]);
      to.mass[m] *= keep[m - m0];
    }
  }
}

// Adds n keys k with values v to the sums, whose anchors rise to the maxima of the log-features.
// p [n][m_stride], p_copy (p as operand) and column_max [m_pad] are scratch memory.
template <class Acc, class In>
PERFORMER_INLINE void AddToSummary(const Map<Acc>& map, const Left<In>& k, const Right<In>& v,
                                   const Acc* offset, int64_t n,
                                   const ProjectionOperands<Acc, In>& projection,
                                   const Strides& strides, bool first, Acc* p, In* p_copy,
                                   Acc* column_max, Prefetcher* prefetcher,
                                   SummaryPartial<Acc> to) {
  using Operand = Operands<Acc, In>;
  for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>)
    Store(column_max + m, Load(to.anchor + m));
  LogFeatures<Acc>(map, k, n, projection, strides, p, nullptr,
                   ColumnMaxima<Acc>{prefetcher, offset, column_max},
                   [&] { ComputeColumnMax(n, strides, offset, p, column_max); });
  RaiseAnchors(strides, column_max, first, to);
  KeyFeatures(n, strides, offset, to.anchor, p, to.mass);
  const Left<In> features =
      Operand::MakeLeftTransposed(p, n, strides.m_pad, strides.m_stride, p_copy);
  if (first) {
    Product<false>(features, v, n, to.sum, strides.e_pad, strides.m, strides.e_pad);
  } else {
    Product<true>(features, v, n, to.sum, strides.e_pad, strides.m, strides.e_pad);
  }
}

template <class Acc, class In>
struct SummarizeScratch {
  KeyChunk<Acc> keys;
  In *k_left, *v_right, *p_left_transposed;  // copies for k, v, p as operands
  Acc* p;                                    // [chunk][m_stride]: log-features, then features
  Acc* column_max;                           // [m_pad]

  void SetPointers(Arena& arena, const Strides& strides, int64_t chunk) {
    k_left = TakeOperand<Acc, In>(arena, chunk * strides.d_pad);
    v_right = TakeOperand<Acc, In>(arena, chunk * strides.e_pad);
    p_left_transposed = TakeOperand<Acc, In>(arena, chunk * strides.m_stride);
    keys.SetPointers(arena, strides, chunk);
    p = arena.Take<Acc>(chunk * strides.m_stride);
    column_max = arena.Take<Acc>(strides.m_pad);
  }
};

// Keys of the range into `partial`.
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
  if (!arena.Allocate([&] { s.SetPointers(arena, strides, chunk); })) return false;
  const int64_t index = KeyHeadIndex(params.keys.projection_heads, range.head);
  const auto weights = Operand::Projection(
      params.attributes, projection + index * PackedProjection<Acc>::Size(strides), strides);

  for (int64_t m = 0; m < strides.m_pad; ++m) partial.anchor[m] = -kInf<Acc>, partial.mass[m] = 0;
  const ConstRows keys = KeyChunk<Acc>::Keys(params, params.keys, range);
  const ConstRows values = KeyChunk<Acc>::Values(params, params.keys, range);
  bool first = true;
  Prefetcher prefetcher;
  for (int64_t row = range.begin; row < range.end; row += chunk) {
    const int64_t n = range.end - row < chunk ? range.end - row : chunk;
    s.keys.LoadBias(params, params.keys, range, row, n);
    if (!s.keys.any) continue;
    const Left<In> k = LoadKeys(keys, row, n, map, strides.d_pad, &s.keys, s.k_left, &prefetcher);
    const Right<In> v = Operand::LoadRight(values, row, n, s.keys.skip, strides.e_pad, s.keys.v,
                                           s.v_right, &prefetcher);
    AddToSummary(map, k, v, s.keys.offset, n, weights, strides, first, s.p, s.p_left_transposed,
                 s.column_max, &prefetcher, partial);
    first = false;
  }
  for (int64_t i = 0; first && i < strides.m * strides.e_pad; ++i) partial.sum[i] = 0;
  return true;
}

PERFORMER_ISA_END
