// One chunk of queries in scratch memory, and their features.
#pragma once
#include "cpu/kernels/log_features.h"

PERFORMER_ISA_BEGIN

template <class Acc>
struct QueryChunk {
  Acc* q;        // [chunk][d_pad]
  Acc* f;        // [chunk][m_stride]: log-features, then features
  Acc* bias;     // [m_pad], of the features
  Acc* row_max;  // [chunk][kLanes]: the maximum of a row of f + bias is that of its lanes
  Acc* shift;    // [chunk]: the maximum of the row, which is subtracted
  Acc* den;      // [chunk]: the denominator of the row

  void SetPointers(Arena& arena, const Strides& strides, int64_t chunk) {
    q = arena.Take<Acc>(chunk * strides.d_pad);
    f = arena.Take<Acc>(chunk * strides.m_stride);
    bias = arena.Take<Acc>(strides.m_pad);
    row_max = arena.Take<Acc>(chunk * kLanes<Acc>);
    shift = arena.Take<Acc>(chunk);
    den = arena.Take<Acc>(chunk);
  }
};

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

// row_max[i]: lanes whose maximum is that of f[i] + bias.
template <class Acc>
void ComputeRowMax(int64_t n, const Strides& strides, const Acc* bias, const Acc* f, Acc* row_max) {
  for (int64_t i = 0; i < n; ++i, f += strides.m_stride) {
    Vec<Acc> highest = Splat(-kInf<Acc>);
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>)
      highest = Max(Load(f + m) + Load(bias + m), highest);
    Store(row_max + i * kLanes<Acc>, highest);
  }
}

// Features of queries: f[i] = 2^(f[i] + bias - shift_i), where shift_i is the maximum of the row (0
// if that is -inf). den_i = sum_m f[i][m] * weight[m], or the sum of f alone without kWeighted,
// with f as products of type In take it.
template <bool kWeighted, class In, class Acc>
void QueryFeatures(int64_t n, const Strides& strides, const Acc* bias, const Acc* weight,
                   const Acc* row_max, Acc* f, Acc* shift, Acc* den) {
  for (int64_t i = 0; i < n; ++i, f += strides.m_stride) {
    const Acc highest = ReduceMax<Acc>(Load(row_max + i * kLanes<Acc>));
    shift[i] = highest == -kInf<Acc> ? Acc(0) : highest;
    Vec<Acc> sum = {};
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
      const Vec<Acc> y = Exp2(Load(f + m) + Load(bias + m) - shift[i]);
      Store(f + m, y);
      const Vec<Acc> rounded = Operands<Acc, In>::Rounded(y);
      sum += kWeighted ? rounded * Load(weight + m) : rounded;
    }
    den[i] = ReduceAdd<Acc>(sum);
  }
}

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

// f, shift and den of n queries, given as left operand `q`; den is weighted by weight [m_pad] if
// kWeighted. slope may be nullptr, as in LogFeatures.
template <bool kWeighted, class Acc, class In>
PERFORMER_INLINE void ComputeQueryFeatures(const Map<Acc>& map, const Left<In>& q, int64_t n,
                                           const ProjectionOperands<Acc, In>& projection,
                                           const Strides& strides, const Acc* weight, Acc* slope,
                                           QueryChunk<Acc>& queries, Prefetcher* prefetcher) {
  QueryLogFeatures(map, q, n, projection, strides, queries.bias, queries.f, slope, queries.row_max,
                   prefetcher);
  QueryFeatures<kWeighted, In>(n, strides, queries.bias, weight, queries.row_max, queries.f,
                               queries.shift, queries.den);
}

PERFORMER_ISA_END
