// Bidirectional attention, second half: queries read the landmarks.
//   out[i] = softmax_m(a[i, :] + log_mass) mean
#pragma once
#include "core/chunks.h"
#include "cpu/features.h"
#include "cpu/state.h"

PERFORMER_ISA_BEGIN

// The projection and feature bias of one query head.
template <class Acc>
struct QueryHead {
  PackedProjection<Acc> projection;
  const Acc* feature_bias;

  QueryHead(const QuerySide& queries, const Acc* packed, const Dims& dims, const Widths& w,
            int64_t head)
      : projection(PackedProjection<Acc>::At(
            packed + QueryHeadIndex(queries.projection_heads, head, dims) *
                         PackedProjection<Acc>::Size(w),
            w)),
        feature_bias(static_cast<const Acc*>(queries.feature_bias) +
                     QueryHeadIndex(queries.feature_bias_heads, head, dims) * w.m) {}
};

template <class Acc>
struct ReadScratch {
  Acc *q, *f, *out, *mean, *bias, *shift, *den;

  void Place(Arena& arena, const Widths& w, int64_t chunk) {
    q = arena.Take<Acc>(chunk * w.d_pad);
    f = arena.Take<Acc>(chunk * w.m_stride);
    out = arena.Take<Acc>(chunk * w.e_pad);
    mean = arena.Take<Acc>(w.m * w.e_pad);
    bias = arena.Take<Acc>(w.m_pad);
    shift = arena.Take<Acc>(chunk);
    den = arena.Take<Acc>(chunk);
  }
};

template <class Acc>
bool Read(const ReadParams& params, const Acc* projection, Slice slice) {
  const Dims& dims = params.dims;
  const Widths w = MakeWidths<Acc>(dims);
  const Map<Acc> map(params);
  const int64_t rows = slice.end - slice.begin, chunk = rows < kReadChunk ? rows : kReadChunk;
  Arena arena;
  ReadScratch<Acc> s;
  s.Place(arena, w, chunk);
  if (!arena.Allocate()) return false;
  s.Place(arena, w, chunk);
  const QueryHead<Acc> head(params.queries, projection, dims, w, slice.head);
  const LoadedState<Acc> state(params.state, dims, slice.sequence, slice.head / GroupSize(dims));
  state.CopyMean(w, s.mean);
  SetBias(state.log_mass, kLog2eDouble, head.feature_bias, w, s.bias);

  Ahead ahead;
  const ConstRows queries = {params.queries.query, params.dtype, dims.heads, slice.head, w.d};
  const MutableRows out = {params.out, params.dtype, dims.heads, slice.head, w.e};
  for (int64_t row = slice.begin; row < slice.end; row += chunk) {
    const int64_t n = slice.end - row < chunk ? slice.end - row : chunk;
    LoadRows(queries, row, n, nullptr, s.q, w.d_pad, &ahead);
    ahead.Want(out, row, n);
    LogFeatures<Acc>(map, s.q, n, head.projection.panels, w, s.f, nullptr, &ahead);
    QueryWeights<false, Acc>(n, w, s.bias, nullptr, s.f, s.shift, s.den);
    MatMul<false>(s.f, w.m_stride, 1, s.mean, w.e_pad, w.m, s.out, w.e_pad, n, w.e_pad);
    ScaleRows(n, w.e_pad, s.den, s.out);
    StoreRows(out, row, n, s.out, w.e_pad);
  }
  return true;
}

PERFORMER_ISA_END
