// Bidirectional attention, second half: queries read the state.
//   out[i] = softmax_m(a[i, :] + log_mass) mean
#pragma once
#include "cpu/chunks.h"
#include "cpu/kernels/query_chunk.h"
#include "cpu/kernels/state.h"

PERFORMER_ISA_BEGIN

template <class Acc, class In>
struct ReadScratch {
  QueryChunk<Acc> queries;
  In *q_left, *f_left, *mean_right;  // copies for q, f, mean as operands
  Acc *out, *mean;                   // [chunk][e_pad], [m][e_pad]

  void SetPointers(Arena& arena, const Strides& strides, int64_t chunk) {
    q_left = TakeOperand<Acc, In>(arena, chunk * strides.d_pad);
    f_left = TakeOperand<Acc, In>(arena, chunk * strides.m_stride);
    mean_right = TakeOperand<Acc, In>(arena, (strides.m + 1) * strides.e_pad);
    queries.SetPointers(arena, strides, chunk);
    out = arena.Take<Acc>(chunk * strides.e_pad);
    mean = arena.Take<Acc>(strides.m * strides.e_pad);
  }
};

// Hook of a product: divides its rows by den, as ScaleRows does.
template <class Acc>
struct DivideRows {
  const Acc* inverse;  // [n]

  // Replaces den [n] by its inverse.
  DivideRows(int64_t n, Acc* den) : inverse(den) {
    for (int64_t i = 0; i < n; ++i) den[i] = Inverse(den[i]);
  }
  PERFORMER_INLINE void Before() {}
  template <class Tile>
  PERFORMER_INLINE void After(Tile& tile, int64_t r0, int64_t) {
    tile.ForEach([&](int r, int, Vec<Acc>& x) {
      x = inverse[r0 + r] == 0 ? Vec<Acc>{} : x * inverse[r0 + r];
    });
  }
};

// Rows of params.out for the range.
template <class Acc, class In>
bool Read(const ReadParams& params, const Acc* projection, WorkRange range) {
  const Dims& dims = params.dims;
  const Strides strides = MakeStrides<Acc>(dims);
  const Map<Acc> map(params);
  const int64_t rows = range.end - range.begin, chunk = rows < kReadChunk ? rows : kReadChunk;
  Arena arena;
  using Operand = Operands<Acc, In>;
  ReadScratch<Acc, In> s;
  if (!arena.Allocate([&] { s.SetPointers(arena, strides, chunk); })) return false;
  const QueryHead<Acc, In> head(params, params.queries, projection, strides, range.head);
  const LoadedState<Acc> state(params.state, dims, range.sequence, range.head / GroupSize(dims));
  state.CopyMean(strides, s.mean);
  const Right<In> mean =
      Operand::MakeRight(s.mean, strides.m, strides.e_pad, strides.e_pad, s.mean_right);
  SetBias(state.log_mass, kLog2eDouble, head.feature_bias, strides, s.queries.bias);

  Prefetcher prefetcher;
  const ConstRows queries = {params.queries.query, params.dtype, dims.heads, range.head, strides.d};
  const MutableRows out = {params.out, params.dtype, dims.heads, range.head, strides.e};
  const bool in_place = out.dtype == kOwnType<Acc> && out.width == strides.e_pad;
  for (int64_t row = range.begin; row < range.end; row += chunk) {
    const int64_t n = range.end - row < chunk ? range.end - row : chunk;
    const Left<In> q = LoadLeft(queries, row, n, strides.d_pad, s.queries.q, s.q_left, &prefetcher);
    prefetcher.Request(out, row, n);
    ComputeQueryFeatures<false>(map, q, n, head.projection, strides,
                                static_cast<const Acc*>(nullptr), static_cast<Acc*>(nullptr),
                                s.queries, &prefetcher);
    const Left<In> f = Operand::MakeLeft(s.queries.f, n, strides.m_pad, strides.m_stride, s.f_left);
    DivideRows<Acc> divide(n, s.queries.den);
    if (in_place) {
      Product<false>(f, mean, strides.m, out.At<Acc>(row), out.heads * out.width, n, strides.e_pad,
                     &divide);
    } else {
      Product<false>(f, mean, strides.m, s.out, strides.e_pad, n, strides.e_pad, &divide);
      StoreRows(out, row, n, s.out, strides.e_pad);
    }
  }
  return true;
}

PERFORMER_ISA_END
