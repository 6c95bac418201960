// Bidirectional attention, second half: queries read the features.
//   out[i] = softmax_m(a[i, :] + log_mass) mean
#pragma once
#include "core/splits.h"
#include "cpu/kernels/state.h"
#include "cpu/memory/packed_operands.h"

PERFORMER_ISA_BEGIN

// [m] of one query head.
template <class Acc>
PERFORMER_INLINE const Acc* FeatureBias(const QuerySide& queries, int64_t head, const Dims& dims) {
  return static_cast<const Acc*>(queries.feature_bias) +
         QueryHeadIndex(queries.feature_bias_heads, head, dims) * dims.features;
}

// The projection and feature bias of one query head.
template <class Acc, class In = Acc>
struct QueryHead {
  ProjectionOperands<Acc, In> projection;
  const Acc* feature_bias;

  QueryHead(const Common& call, const QuerySide& queries, const Acc* packed, const Widths& w,
            int64_t head)
      : projection(Operands<Acc, In>::Projection(
            call.attributes,
            packed + QueryHeadIndex(queries.projection_heads, head, call.dims) *
                         PackedProjection<Acc>::Size(w),
            w)),
        feature_bias(FeatureBias<Acc>(queries, head, call.dims)) {}
};

// f and the maxima of f + bias that QueryWeights wants.
template <class Acc, class In>
void QueryLogFeatures(const Map<Acc>& map, const Left<In>& q, int64_t n,
                      const ProjectionOperands<Acc, In>& projection, const Widths& w,
                      const Acc* bias, Acc* f, Acc* slope, Acc* tops, Ahead* ahead) {
  for (int64_t i = 0; i < n * kLanes<Acc>; ++i) tops[i] = -kInf<Acc>;
  LogFeatures<Acc>(map, q, n, projection, w, f, slope, RowMaxima<Acc>{ahead, bias, tops},
                   [&] { RowTops(n, w, bias, f, tops); });
}

template <class Acc, class In>
struct ReadScratch {
  Acc *q, *f, *out, *mean, *bias, *tops, *shift, *den;
  In *q_operand, *f_operand, *mean_operand;

  void Place(Arena& arena, const Widths& w, int64_t chunk) {
    const auto take = [&](int64_t numbers) {
      return arena.Take<In>(Operands<Acc, In>::Size(numbers));
    };
    q_operand = take(chunk * w.d_pad);
    f_operand = take(chunk * w.m_stride);
    mean_operand = take((w.m + 1) * w.e_pad);
    q = arena.Take<Acc>(chunk * w.d_pad);
    f = arena.Take<Acc>(chunk * w.m_stride);
    out = arena.Take<Acc>(chunk * w.e_pad);
    mean = arena.Take<Acc>(w.m * w.e_pad);
    bias = arena.Take<Acc>(w.m_pad);
    tops = arena.Take<Acc>(chunk * kLanes<Acc>);
    shift = arena.Take<Acc>(chunk);
    den = arena.Take<Acc>(chunk);
  }
};

// Hook of a product: divides its rows by den, as ScaleRows does.
template <class Acc>
struct ScaledRows {
  const Acc* inverse;

  // Replaces den by its inverse.
  ScaledRows(int64_t n, Acc* den) : inverse(den) {
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

template <class Acc, class In>
bool Read(const ReadParams& params, const Acc* projection, Slice slice) {
  const Dims& dims = params.dims;
  const Widths w = MakeWidths<Acc>(dims);
  const Map<Acc> map(params);
  const int64_t rows = slice.end - slice.begin, chunk = rows < kReadChunk ? rows : kReadChunk;
  Arena arena;
  using Operand = Operands<Acc, In>;
  ReadScratch<Acc, In> s;
  s.Place(arena, w, chunk);
  if (!arena.Allocate()) return false;
  s.Place(arena, w, chunk);
  const QueryHead<Acc, In> head(params, params.queries, projection, w, slice.head);
  const LoadedState<Acc> state(params.state, dims, slice.sequence, slice.head / GroupSize(dims));
  state.CopyMean(w, s.mean);
  const Right<In> mean = Operand::Stack(s.mean, w.m, w.e_pad, w.e_pad, s.mean_operand);
  SetBias(state.log_mass, kLog2eDouble, head.feature_bias, w, s.bias);

  Ahead ahead;
  const ConstRows queries = {params.queries.query, params.dtype, dims.heads, slice.head, w.d};
  const MutableRows out = {params.out, params.dtype, dims.heads, slice.head, w.e};
  const bool in_place = out.dtype == kOwnType<Acc> && out.width == w.e_pad;
  for (int64_t row = slice.begin; row < slice.end; row += chunk) {
    const int64_t n = slice.end - row < chunk ? slice.end - row : chunk;
    const Left<In> q = LoadLeft(queries, row, n, w.d_pad, s.q, s.q_operand, &ahead);
    ahead.Want(out, row, n);
    QueryLogFeatures(map, q, n, head.projection, w, s.bias, s.f, static_cast<Acc*>(nullptr), s.tops,
                     &ahead);
    QueryWeights<false, Acc>(n, w, s.bias, nullptr, s.tops, s.f, s.shift, s.den);
    const Left<In> f = Operand::Rows(s.f, n, w.m_pad, w.m_stride, s.f_operand);
    ScaledRows<Acc> scaled(n, s.den);
    if (in_place) {
      Product<false>(f, mean, w.m, out.At<Acc>(row), out.heads * out.width, n, w.e_pad, &scaled);
    } else {
      Product<false>(f, mean, w.m, s.out, w.e_pad, n, w.e_pad, &scaled);
      StoreRows(out, row, n, s.out, w.e_pad);
    }
  }
  return true;
}

PERFORMER_ISA_END
