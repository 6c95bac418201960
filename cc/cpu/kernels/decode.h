// Causal attention of one token: the state takes in its key and value, then its queries read the
// state. This is one pass over the means; packing a projection would not pay for one row.
//   x = 2^-|log_mass - b|                       log_mass' = max(log_mass, b) + log2(1 + x)
//   mean' = mean + x / (1 + x) (v - mean), the two exchanged where b > log_mass
//   out = softmax_m(a + log_mass') mean'
// So the weights of mean and v add up to 1 exactly, and log_mass is a sum in double, rounded
// stochastically: what a token adds may be less than an ulp, and errors of millions of tokens must
// not add up.
#pragma once
#include "cpu/kernels/key_chunk.h"
#include "cpu/kernels/query_chunk.h"
#include "cpu/kernels/state.h"

PERFORMER_ISA_BEGIN

template <class Acc>
struct DecodeScratch {
  KeyChunk<Acc> keys;
  Acc* weights;                // [d_pad]: one row of the projection
  Acc *b, *bias;               // [m_pad]
  Acc* log_mass;               // [m_pad]: in base 2, of the state after the token
  double* log_mass_after;      // [m_pad]: the same in nats, before it is rounded
  Acc* weight;                 // [m_pad]: of v in mean', or of mean where b > log_mass
  Acc *q, *f, *out;            // [d_pad], [group][m_stride], [group][e_pad]
  Acc *row_max, *shift, *den;  // [kLanes], [group], [group]

  void SetPointers(Arena& arena, const Strides& strides, int64_t group) {
    keys.SetPointers(arena, strides, 1);
    weights = arena.Take<Acc>(strides.d_pad);
    for (Acc** row : {&b, &weight, &log_mass, &bias}) *row = arena.Take<Acc>(strides.m_pad);
    log_mass_after = arena.Take<double>(strides.m_pad);
    q = arena.Take<Acc>(strides.d_pad);
    f = arena.Take<Acc>(group * strides.m_stride);
    out = arena.Take<Acc>(group * strides.e_pad);
    row_max = arena.Take<Acc>(kLanes<Acc>);
    shift = arena.Take<Acc>(group);
    den = arena.Take<Acc>(group);
  }
};

// to[i] = scale rows[i].x for n rows, four of them at a time; the width is a multiple of the lanes.
// The sums are those of Dot.
template <class Acc>
PERFORMER_INLINE void ProductsOfOne(int64_t n, const Acc* rows, int64_t stride, int64_t width,
                                    Acc scale, const Acc* x, Acc* to) {
  constexpr int kRows = 4;
  int64_t i = 0;
  for (; i + kRows <= n; i += kRows) {
    const Acc* row = rows + i * stride;
    Vec<Acc> sum[kRows] = {};
    for (int64_t d = 0; d < width; d += kLanes<Acc>) {
      const Vec<Acc> y = Load(x + d);
      PERFORMER_UNROLL
      for (int r = 0; r < kRows; ++r) sum[r] += Load(row + r * stride + d) * y;
    }
    PERFORMER_UNROLL
    for (int r = 0; r < kRows; ++r) to[i + r] = scale * ReduceAdd<Acc>(sum[r]);
  }
  for (; i < n; ++i) to[i] = scale * Dot(rows + i * stride, x, width);
}

// f[m] = log2 phi_m(x) without biases and norms, from a projection [m, d] as the caller gave it.
template <class Acc>
void LogFeaturesOfOne(const Common& call, const Map<Acc>& map, const Strides& strides,
                      const Acc* projection, const Acc* x, Acc* weights, Acc* f) {
  const Acc scale = static_cast<Acc>(__builtin_sqrt(static_cast<double>(map.scale)) *
                                     (map.linear() ? kLog2eDouble : 1.0));
  const bool exact = call.dtype == DType::kFloat32 || call.dtype == DType::kFloat64;
  if (exact && strides.d % kLanes<Acc> == 0) {
    ProductsOfOne(strides.m, projection, strides.d, strides.d, scale, x, f);
  } else {
    for (int64_t d = strides.d; d < strides.d_pad; ++d) weights[d] = 0;
    for (int64_t m = 0; m < strides.m; ++m) {
      for (int64_t d = 0; d < strides.d; ++d)
        weights[d] = RoundTo(call.dtype, projection[m * strides.d + d]);
      f[m] = scale * Dot(weights, x, strides.d_pad);
    }
  }
  for (int64_t m = strides.m; m < strides.m_pad; ++m) f[m] = 0;
  ApplyMap<Acc>(map, 1, strides.m_pad, strides.m_stride, f, nullptr);
}

// out[e] += sum_i weight[i] rows[i][e] over the n rows that count, in their order.
template <class Acc, class Counts>
PERFORMER_INLINE void AddWeightedRows(int64_t n, const Acc* weight, const Acc* rows, int64_t stride,
                                      int64_t width, Counts counts, Acc* out) {
  constexpr int kVecs = 8;
  int64_t e = 0;
  for (; e + kVecs * kLanes<Acc> <= width; e += kVecs * kLanes<Acc>) {
    Vec<Acc> sum[kVecs];
    PERFORMER_UNROLL
    for (int v = 0; v < kVecs; ++v) sum[v] = Load(out + e + v * kLanes<Acc>);
    for (int64_t i = 0; i < n; ++i) {
      if (!counts(i)) continue;
      const Acc* row = rows + i * stride + e;
      PERFORMER_UNROLL
      for (int v = 0; v < kVecs; ++v) sum[v] += weight[i] * Load(row + v * kLanes<Acc>);
    }
    PERFORMER_UNROLL
    for (int v = 0; v < kVecs; ++v) Store(out + e + v * kLanes<Acc>, sum[v]);
  }
  for (; e + kLanes<Acc> <= width; e += kLanes<Acc>) {
    Vec<Acc> sum = Load(out + e);
    for (int64_t i = 0; i < n; ++i)
      if (counts(i)) sum += weight[i] * Load(rows + i * stride + e);
    Store(out + e, sum);
  }
  for (; e < width; ++e)
    for (int64_t i = 0; i < n; ++i)
      if (counts(i)) out[e] += weight[i] * rows[i * stride + e];
}

// to[e] = x[e] + weight (y[e] - x[e]); `to` may be x or y.
template <class Acc>
PERFORMER_INLINE void Mix(const Acc* x, const Acc* y, Acc weight, int64_t width, Acc* to) {
  int64_t e = 0;
  for (; e + kLanes<Acc> <= width; e += kLanes<Acc>)
    Store(to + e, Load(x + e) + weight * (Load(y + e) - Load(x + e)));
  for (; e < width; ++e) to[e] = x[e] + weight * (y[e] - x[e]);
}

// weight, log_mass and log_mass_after. b becomes the log-features of the key, offset included.
template <class Acc>
void DecodeWeights(const Strides& strides, const LoadedState<Acc>& before, Acc offset,
                   DecodeScratch<Acc>& s) {
  for (int64_t m = 0; m < strides.m_pad; ++m) {
    s.log_mass_after[m] = m < strides.m ? before.Log2Mass(m) : -__builtin_inf();
    s.b[m] += offset;
    const double difference = s.log_mass_after[m] - static_cast<double>(s.b[m]);
    s.weight[m] = static_cast<Acc>(-__builtin_fabs(difference));
  }
  for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
    const Vec<Acc> x = Exp2(Load(s.weight + m));
    Store(s.weight + m, x / (Acc(1) + x));
    Store(s.log_mass + m, Log2OnePlus(x));
  }
  for (int64_t m = 0; m < strides.m_pad; ++m) {
    const double a = s.log_mass_after[m], b = static_cast<double>(s.b[m]);
    const bool nothing = a == -__builtin_inf() && b == -__builtin_inf();
    // In this order NaN of b stays.
    const double log2_mass = (a >= b ? a : b) + static_cast<double>(s.log_mass[m]);
    s.log_mass[m] = nothing ? -kInf<Acc> : static_cast<Acc>(log2_mass);
    s.log_mass_after[m] = nothing ? -__builtin_inf() : kLn2Double * log2_mass;
  }
}

// f and den of the queries of all heads of the group.
template <class Acc>
PERFORMER_INLINE void DecodeQueries(const CausalParams& params, const WorkRange& range,
                                    const Map<Acc>& map, const Strides& strides,
                                    Prefetcher* prefetcher, DecodeScratch<Acc>& s) {
  const Dims& dims = params.dims;
  const int64_t group = GroupSize(dims);
  for (int64_t i = 0; i < group; ++i) {
    const int64_t head = range.head * group + i;
    const int64_t index = QueryHeadIndex(params.queries.projection_heads, head, dims);
    const Acc* projection =
        static_cast<const Acc*>(params.queries.projection) + index * strides.m * strides.d;
    LoadRows<Acc>({params.queries.query, params.dtype, dims.heads, head, strides.d}, range.begin, 1,
                  nullptr, s.q, strides.d_pad, prefetcher);
    Acc* f = s.f + i * strides.m_stride;
    LogFeaturesOfOne(params, map, strides, projection, s.q, s.weights, f);
    SetBias(s.log_mass, 1.0, FeatureBias<Acc>(params.queries, head, dims), strides, s.bias);
    ComputeRowMax(1, strides, s.bias, f, s.row_max);
    QueryFeatures<false, Acc, Acc>(1, strides, s.bias, nullptr, s.row_max, f, s.shift + i,
                                   s.den + i);
  }
}

// The state after the token, and the unnormalised out of all heads of the group. The state may take
// the place of that before.
template <class Acc>
PERFORMER_INLINE void DecodeState(const LoadedState<Acc>& before, const Strides& strides,
                                  int64_t group, Acc* log_mass, Acc* mean, DecodeScratch<Acc>& s) {
  constexpr int64_t kBlock = 32;  // means that stay in the cache until all queries have read them
  for (int64_t i = 0; i < group * strides.e_pad; ++i) s.out[i] = 0;
  for (int64_t first = 0; first < strides.m; first += kBlock) {
    const int64_t end = first + kBlock < strides.m ? first + kBlock : strides.m;
    for (int64_t m = first; m < end; ++m) {
      const Acc *from = before.mean + m * strides.e, *v = s.keys.v;
      Acc* to = mean + m * strides.e;
      const bool was_empty = before.log_mass[m] == -kInf<Acc>;  // its mean may hold anything
      const bool is_older = before.Log2Mass(m) >= static_cast<double>(s.b[m]);
      log_mass[m] = s.b[m] == -kInf<Acc> ? before.log_mass[m]
                                         : RoundStochastically<Acc>(s.log_mass_after[m], m);
      if (s.log_mass[m] == -kInf<Acc>) {
        for (int64_t e = 0; e < strides.e; ++e) to[e] = 0;
      } else if (was_empty) {
        for (int64_t e = 0; e < strides.e; ++e) to[e] = v[e];
      } else if (is_older) {
        Mix(from, v, s.weight[m], strides.e, to);
      } else {
        Mix(v, from, s.weight[m], strides.e, to);
      }
    }
    for (int64_t i = 0; i < group; ++i)
      AddWeightedRows(
          end - first, s.f + i * strides.m_stride + first, mean + first * strides.e, strides.e,
          strides.e, [](int64_t) { return true; }, s.out + i * strides.e_pad);
  }
}

template <class Acc>
bool Decode(const CausalParams& params, WorkRange range) {
  const Dims& dims = params.dims;
  const Strides strides = MakeStrides<Acc>(dims);
  const Map<Acc> map(params);
  const int64_t group = GroupSize(dims);
  Arena arena;
  DecodeScratch<Acc> s;
  if (!arena.Allocate([&] { s.SetPointers(arena, strides, group); })) return false;
  Prefetcher prefetcher;

  s.keys.Load(params, params.keys, map, strides, range, range.begin, 1, &prefetcher);
  const int64_t index = KeyHeadIndex(params.keys.projection_heads, range.head);
  const Acc* projection =
      static_cast<const Acc*>(params.keys.projection) + index * strides.m * strides.d;
  LogFeaturesOfOne(params, map, strides, projection, s.keys.k, s.weights, s.b);
  const LoadedState<Acc> before(params.initial, dims, range.sequence, range.head);
  DecodeWeights(strides, before, s.keys.offset[0], s);
  DecodeQueries(params, range, map, strides, &prefetcher, s);

  const int64_t at = (range.sequence * dims.groups + range.head) * strides.m;
  DecodeState(before, strides, group, static_cast<Acc*>(params.state.log_mass) + at,
              static_cast<Acc*>(params.state.mean) + at * strides.e, s);
  for (int64_t i = 0; i < group; ++i) {
    ScaleRows(1, strides.e_pad, s.den + i, s.out + i * strides.e_pad);
    StoreRows<Acc>({params.out, params.dtype, dims.heads, range.head * group + i, strides.e},
                   range.begin, 1, s.out + i * strides.e_pad, strides.e_pad);
  }
  return true;
}

PERFORMER_ISA_END
