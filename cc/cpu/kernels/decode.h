// Causal attention of one token: the state takes in its key and value, and its queries read the
// state. One pass over the means; packing a projection would not pay for one row.
//   anchor' = max(log_mass, b)   mass' = 2^(log_mass - anchor') + 2^(b - anchor')
//   mean' = (2^(log_mass - anchor') mean + 2^(b - anchor') v) / mass'
//   log_mass' = anchor' + log2 mass'         out = softmax_m(a + log_mass') mean'
#pragma once
#include "cpu/kernels/log_features.h"
#include "cpu/kernels/read.h"
#include "cpu/kernels/state.h"

PERFORMER_ISA_BEGIN

template <class Acc>
struct StepScratch {
  KeyChunk<Acc> keys;
  Acc *weights, *b, *keep, *add, *log_mass, *bias;  // [d_pad], then [m_pad] each
  Acc *q, *f, *out;                                 // [d_pad], [group][m_pad], [group][e_pad]
  Acc *tops, *shift, *den;                          // [kLanes], [group], [group]

  void Place(Arena& arena, const Widths& w, int64_t group) {
    keys.Place(arena, w, 1);
    weights = arena.Take<Acc>(w.d_pad);
    for (Acc** row : {&b, &keep, &add, &log_mass, &bias}) *row = arena.Take<Acc>(w.m_pad);
    q = arena.Take<Acc>(w.d_pad);
    f = arena.Take<Acc>(group * w.m_stride);
    out = arena.Take<Acc>(group * w.e_pad);
    tops = arena.Take<Acc>(kLanes<Acc>);
    shift = arena.Take<Acc>(group);
    den = arena.Take<Acc>(group);
  }
};

// f[m] = log2 phi_m(x) without biases and norms, from a projection [m, d] as given.
template <class Acc>
void LogFeaturesOfOne(const Common& call, const Map<Acc>& map, const Widths& w,
                      const Acc* projection, const Acc* x, Acc* weights, Acc* f) {
  const Acc scale = static_cast<Acc>(__builtin_sqrt(static_cast<double>(map.scale)) *
                                     (map.linear() ? kLog2eDouble : 1.0));
  for (int64_t d = w.d; d < w.d_pad; ++d) weights[d] = 0;
  for (int64_t m = 0; m < w.m_pad; ++m) {
    if (m >= w.m) {
      f[m] = 0;
      continue;
    }
    for (int64_t d = 0; d < w.d; ++d) weights[d] = RoundTo(call.dtype, projection[m * w.d + d]);
    f[m] = scale * Dot(weights, x, w.d_pad);
  }
  ApplyMap<Acc>(map, 1, w.m_pad, w.m_stride, f, nullptr);
}

// The weights of the state before and of the key, and log2 of the mass after.
template <class Acc>
void WeighStep(const Widths& w, const Acc* before, Acc offset, StepScratch<Acc>& s) {
  for (int64_t m = 0; m < w.m_pad; ++m)
    s.log_mass[m] = m < w.m ? before[m] * kLog2e<Acc> : -kInf<Acc>;
  for (int64_t m = 0; m < w.m_pad; m += kLanes<Acc>) {
    const Vec<Acc> zero = {}, one = Splat(Acc(1)), a = Load(s.log_mass + m),
                   b = Load(s.b + m) + offset;
    const Vec<Acc> top = Max(b, a);  // in this order NaN is passed over
    const IntVec<Acc> nothing = top == -kInf<Acc>;
    const Vec<Acc> anchor = nothing ? zero : top;
    const Vec<Acc> keep = Exp2(a - anchor), add = Exp2(b - anchor), mass = keep + add;
    const Vec<Acc> inverse = nothing ? zero : one / mass;
    Store(s.keep + m, keep * inverse);
    Store(s.add + m, add * inverse);
    Store(s.log_mass + m, anchor + Log2(mass));
  }
}

template <class Acc>
bool Step(const CausalParams& params, Slice slice) {
  const Dims& dims = params.dims;
  const Widths w = MakeWidths<Acc>(dims);
  const Map<Acc> map(params);
  const int64_t group = GroupSize(dims);
  Arena arena;
  StepScratch<Acc> s;
  s.Place(arena, w, group);
  if (!arena.Allocate()) return false;
  s.Place(arena, w, group);
  Ahead ahead;
  const auto projection = [&](const void* data, int64_t index) {
    return static_cast<const Acc*>(data) + index * w.m * w.d;
  };

  s.keys.Load(params, params.keys, map, w, slice, slice.begin, 1, &ahead);
  const int64_t index = params.keys.projection_heads == 1 ? 0 : slice.head;
  LogFeaturesOfOne(params, map, w, projection(params.keys.projection, index), s.keys.k, s.weights,
                   s.b);
  const LoadedState<Acc> before(params.initial, dims, slice.sequence, slice.head);
  WeighStep(w, before.log_mass, s.keys.offset[0], s);

  for (int64_t i = 0; i < group; ++i) {
    const int64_t head = slice.head * group + i;
    const int64_t query_index = QueryHeadIndex(params.queries.projection_heads, head, dims);
    LoadRows<Acc>({params.queries.query, params.dtype, dims.heads, head, w.d}, slice.begin, 1,
                  nullptr, s.q, w.d_pad, &ahead);
    Acc* f = s.f + i * w.m_stride;
    LogFeaturesOfOne(params, map, w, projection(params.queries.projection, query_index), s.q,
                     s.weights, f);
    SetBias(s.log_mass, 1.0, FeatureBias<Acc>(params.queries, head, dims), w, s.bias);
    RowTops(1, w, s.bias, f, s.tops);
    QueryWeights<false, Acc>(1, w, s.bias, nullptr, s.tops, f, s.shift + i, s.den + i);
  }

  const int64_t at = (slice.sequence * dims.groups + slice.head) * w.m;
  Acc* log_mass = static_cast<Acc*>(params.state.log_mass) + at;
  Acc* mean = static_cast<Acc*>(params.state.mean) + at * w.e;
  for (int64_t i = 0; i < group * w.e_pad; ++i) s.out[i] = 0;
  for (int64_t m = 0; m < w.m; ++m) {
    const bool empty = before.log_mass[m] == -kInf<Acc>;  // its mean may hold anything
    const Acc *from = before.mean + m * w.e, keep = s.keep[m], add = s.add[m];
    Acc* to = mean + m * w.e;
    log_mass[m] = kLn2<Acc> * s.log_mass[m];
    for (int64_t e = 0; e < w.e; ++e)
      to[e] = empty ? add * s.keys.v[e] : keep * from[e] + add * s.keys.v[e];
    for (int64_t i = 0; i < group; ++i) {
      const Acc f = s.f[i * w.m_stride + m];
      Acc* out = s.out + i * w.e_pad;
      for (int64_t e = 0; e < w.e; ++e) out[e] += f * to[e];
    }
  }
  for (int64_t i = 0; i < group; ++i) {
    ScaleRows(1, w.e_pad, s.den + i, s.out + i * w.e_pad);
    StoreRows<Acc>({params.out, params.dtype, dims.heads, slice.head * group + i, w.e}, slice.begin,
                   1, s.out + i * w.e_pad, w.e_pad);
  }
  return true;
}

PERFORMER_ISA_END
