// Bidirectional attention, second half: queries read the state.
//   out[i] = softmax_m(a[i, :] + log_mass) mean
#pragma once
#include "core/splits.h"
#include "cpu/kernels/log_features.h"
#include "cpu/kernels/state.h"

PERFORMER_ISA_BEGIN

// The feature bias [m] of one query head.
template <class Acc>
PERFORMER_INLINE const Acc* FeatureBias(const QuerySide& queries, int64_t head, const Dims& dims) {
  return static_cast<const Acc*>(queries.feature_bias) +
         QueryHeadIndex(queries.feature_bias_heads, head, dims) * dims.features;
}

// The projection and feature bias of one query head.
template <class Acc, class In = Acc>
struct QueryHead {
  ProjectionOperands<Acc, In> projection;
  const Acc* feature_bias;  // [m]

  QueryHead(const Common& call, const QuerySide& queries, const Acc* packed, const Strides& strides,
            int64_t head)
      : projection(Operands<Acc, In>::Projection(
            call.attributes,
            packed + QueryHeadIndex(queries.projection_heads, head, call.dims) *
                         PackedProjection<Acc>::Size(strides),
            strides)),
        feature_bias(FeatureBias<Acc>(queries, head, call.dims)) {}
};

// Query log-features f, and the row maxima of f + bias that QueryFeatures needs.
template <class Acc, class In>
void QueryLogFeatures(const Map<Acc>& map, const Left<In>& q, int64_t n,
                      const ProjectionOperands<Acc, In>& projection, const Strides& strides,
                      const Acc* bias, Acc* f, Acc* slope, Acc* row_max, Prefetcher* prefetcher) {
  for (int64_t i = 0; i < n * kLanes<Acc>; ++i) row_max[i] = -kInf<Acc>;
  LogFeatures<Acc>(map, q, n, projection, strides, f, slope,
                   RowMaxima<Acc>{prefetcher, bias, row_max},
                   [&] { ComputeRowMax(n, strides, bias, f, row_max); });
}

template <class Acc, class In>
struct ReadScratch {
  In *q_left, *f_left, *mean_right;  // copies for q, f, mean as operands
  Acc *q, *f, *out;                  // [chunk][d_pad], [chunk][m_stride], [chunk][e_pad]
  Acc *mean, *bias;                  // [m][e_pad], [m_pad]
  Acc *row_max, *shift, *den;        // [chunk][kLanes], [chunk], [chunk]

  void SetPointers(Arena& arena, const Strides& strides, int64_t chunk) {
    q_left = TakeOperand<Acc, In>(arena, chunk * strides.d_pad);
    f_left = TakeOperand<Acc, In>(arena, chunk * strides.m_stride);
    mean_right = TakeOperand<Acc, In>(arena, (strides.m + 1) * strides.e_pad);
    q = arena.Take<Acc>(chunk * strides.d_pad);
    f = arena.Take<Acc>(chunk * strides.m_stride);
    out = arena.Take<Acc>(chunk * strides.e_pad);
    mean = arena.Take<Acc>(strides.m * strides.e_pad);
    bias = arena.Take<Acc>(strides.m_pad);
    row_max = arena.Take<Acc>(chunk * kLanes<Acc>);
    shift = arena.Take<Acc>(chunk);
    den = arena.Take<Acc>(chunk);
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
  SetBias(state.log_mass, kLog2eDouble, head.feature_bias, strides, s.bias);

  Prefetcher prefetcher;
  const ConstRows queries = {params.queries.query, params.dtype, dims.heads, range.head, strides.d};
  const MutableRows out = {params.out, params.dtype, dims.heads, range.head, strides.e};
  const bool in_place = out.dtype == kOwnType<Acc> && out.width == strides.e_pad;
  for (int64_t row = range.begin; row < range.end; row += chunk) {
    const int64_t n = range.end - row < chunk ? range.end - row : chunk;
    const Left<In> q = LoadLeft(queries, row, n, strides.d_pad, s.q, s.q_left, &prefetcher);
    prefetcher.Request(out, row, n);
    QueryLogFeatures(map, q, n, head.projection, strides, s.bias, s.f, static_cast<Acc*>(nullptr),
                     s.row_max, &prefetcher);
    QueryFeatures<false, Acc>(n, strides, s.bias, nullptr, s.row_max, s.f, s.shift, s.den);
    const Left<In> f = Operand::MakeLeft(s.f, n, strides.m_pad, strides.m_stride, s.f_left);
    DivideRows<Acc> divide(n, s.den);
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
