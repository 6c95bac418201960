// Near-and-far attention of one query, the last row of causal keys: no projection is packed, and keys,
// values and the state are read where they lie. Only a block of keys that joins the state, one token
// in exact_window, goes the way of longer calls.
#pragma once
#include "cpu/kernels/decode.h"
#include "cpu/kernels/near_far/far_states.h"
#include "cpu/kernels/near_far/logits.h"
#include "cpu/memory/packed_operands.h"

PERFORMER_ISA_BEGIN

// Sums of far keys, relative to 2^anchor.
template <class Acc>
struct FarSums {
  const Acc *anchor, *mass;  // [m_pad]
  const Acc* rows;           // [m][stride]; anything where the anchor is -inf
  int64_t stride;
};

// Near keys and values as rows [n], and their biases.
template <class Acc>
struct NearRows {
  int64_t n;
  Left<Acc> k, v;
  const Acc* bias;      // [n]
  const uint8_t* skip;  // [n]: 1 where masked
};

// The state of far keys: the initial one, to which blocks of keys may be added.
template <class Acc>
class DecodedState {
 public:
  DecodedState(const NearFarParams& params, const WorkRange& range, const Strides& strides)
      : params_(params),
        range_(range),
        strides_(strides),
        map_(params),
        initial_(params.initial, params.dims, range.sequence, range.head) {}

  // Adds n keys from tensor row `row` on. False if there is no memory.
  bool Add(int64_t row, int64_t n, KeyChunk<Acc>& keys, Prefetcher* prefetcher) {
    keys.LoadBias(params_, params_.keys, range_, row, n);
    if (!keys.any) return true;
    if (!has_keys_ && !Start()) return false;
    summarizer_.AddRows(params_, params_.keys, map_, range_, row, row + n,
                        Operands<Acc, Acc>::Projection(params_.attributes, packed_, strides_),
                        strides_, nullptr, false, prefetcher, state_.Own(strides_));
    return true;
  }
  // `anchor` and `mass` [m_pad] are memory for the initial state, whose means are its sums.
  FarSums<Acc> Sums(Acc* anchor, Acc* mass) const {
    if (has_keys_) {
      state_.Update(strides_);
      const auto all = state_.All(strides_);
      return {all.anchor, all.mass, all.sum, strides_.e_pad};
    }
    for (int64_t m = 0; m < strides_.m_pad; ++m) {
      anchor[m] = m < strides_.m ? static_cast<Acc>(initial_.Log2Mass(m)) : -kInf<Acc>;
      mass[m] = anchor[m] == -kInf<Acc> ? 0 : 1;
    }
    return {anchor, mass, initial_.mean, strides_.e};
  }
  // Writes the final state.
  void Store() const {
    const int64_t at = (range_.sequence * params_.dims.groups + range_.head) * strides_.m;
    Acc *log_mass = static_cast<Acc*>(params_.state.log_mass) + at,
        *mean = static_cast<Acc*>(params_.state.mean) + at * strides_.e;
    if (has_keys_) {
      const auto own = state_.Own(strides_);
      WriteNextState(strides_, initial_, own.anchor, own.mass, own.sum, log_mass, mean);
    } else {
      CopyGivenState(strides_, initial_, log_mass, mean);
    }
  }

 private:
  // Packs the key projection and clears the sums.
  bool Start() {
    const int64_t rows = range_.end - range_.begin, window = params_.attributes.exact_window;
    if (!arena_.Allocate([&] {
          packed_ = arena_.Take<Acc>(PackedProjection<Acc>::Size(strides_));
          summarizer_.SetPointers(arena_, strides_, rows < window ? rows : window);
          state_.SetPointers(arena_, strides_);
        }))
      return false;
    const int64_t index = KeyHeadIndex(params_.keys.projection_heads, range_.head);
    PackProjection(
        params_.attributes, params_.dtype, strides_,
        static_cast<const Acc*>(params_.keys.projection) + index * strides_.m * strides_.d,
        packed_);
    state_.Start(initial_, strides_);
    return has_keys_ = true;
  }

  const NearFarParams& params_;
  const WorkRange range_;
  const Strides strides_;
  const Map<Acc> map_;
  const LoadedState<Acc> initial_;
  Arena arena_;
  Acc* packed_ = nullptr;  // [PackedProjection::Size]
  BlockSummarizer<Acc> summarizer_;
  RunningState<Acc> state_;
  bool has_keys_ = false;
};

template <class Acc>
struct NearFarDecodeScratch {
  KeyChunk<Acc> keys;
  Acc *q, *weights, *out;             // [d_pad], [d_pad], [e_pad]
  Acc *anchor, *mass, *far_bias, *f;  // [m_pad]
  Acc* s;                             // [rows of near keys, padded]: scores, then weights

  void SetPointers(Arena& arena, const Strides& strides, int64_t key_rows) {
    keys.SetPointers(arena, strides, key_rows);
    for (Acc** row : {&q, &weights}) *row = arena.Take<Acc>(strides.d_pad);
    out = arena.Take<Acc>(strides.e_pad);
    for (Acc** row : {&anchor, &mass, &far_bias}) *row = arena.Take<Acc>(strides.m_pad);
    f = arena.Take<Acc>(strides.m_stride);
    s = arena.Take<Acc>(RoundUp(key_rows, kPad<Acc>));
  }
};

// Replaces n scores and the log-features by weights relative to the largest; returns that maximum, 0
// if it is -inf, and their sum.
template <class Acc>
void DecodedWeights(const Strides& strides, int64_t n, Acc norm, const Acc* mass,
                    NearFarDecodeScratch<Acc>& s, Acc* shift, Acc* den) {
  Vec<Acc> highest = Splat(-kInf<Acc>), sum = {};
  for (int64_t j = n; j < RoundUp(n, kLanes<Acc>); ++j) s.s[j] = -kInf<Acc>;
  for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
    Store(s.f + m, Load(s.f + m) + Load(s.far_bias + m) - norm);
    highest = Max(Load(s.f + m), highest);
  }
  for (int64_t j = 0; j < n; j += kLanes<Acc>) highest = Max(Load(s.s + j), highest);
  const Acc top = ReduceMax<Acc>(highest);
  *shift = top == -kInf<Acc> ? Acc(0) : top;
  for (int64_t j = 0; j < n; j += kLanes<Acc>) {
    const Vec<Acc> y = Exp2(Load(s.s + j) - *shift);
    Store(s.s + j, y);
    sum += y;
  }
  for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
    const Vec<Acc> y = Exp2(Load(s.f + m) - *shift);
    Store(s.f + m, y);
    sum += y * Load(mass + m);
  }
  *den = ReduceAdd<Acc>(sum);
}

// s.out = the unnormalised output.
template <class Acc>
void DecodedOutput(const Strides& strides, const NearRows<Acc>& near, const FarSums<Acc>& far,
                   NearFarDecodeScratch<Acc>& s) {
  for (int64_t e = 0; e < strides.e_pad; ++e) s.out[e] = 0;
  AddWeightedRows(
      near.n, s.s, near.v.data, near.v.row_stride, strides.e,
      [&](int64_t j) { return !near.skip[j]; }, s.out);
  AddWeightedRows(
      strides.m, s.f, far.rows, far.stride, strides.e,
      [&](int64_t m) { return far.anchor[m] != -kInf<Acc>; }, s.out);
}

// out and log_weight of one query head.
template <class Acc>
void DecodeNearFarHead(const NearFarParams& params, int64_t sequence, int64_t head,
                       const Strides& strides, const Map<Acc>& map, const NearRows<Acc>& near,
                       const FarSums<Acc>& far, Prefetcher* prefetcher,
                       NearFarDecodeScratch<Acc>& s) {
  const Dims& dims = params.dims;
  const int64_t index = QueryHeadIndex(params.queries.projection_heads, head, dims);
  LoadRows<Acc>({params.queries.query, params.dtype, dims.heads, head, strides.d}, sequence, 1,
                nullptr, s.q, strides.d_pad, prefetcher);
  ProductsOfOne(near.n, near.k.data, near.k.row_stride, strides.d_pad, map.scale, s.q, s.s);
  for (int64_t j = 0; j < near.n; ++j)
    s.s[j] = near.skip[j] ? -kInf<Acc> : kLog2e<Acc> * (s.s[j] + near.bias[j]);
  LogFeaturesOfOne(
      params, map, strides,
      static_cast<const Acc*>(params.queries.projection) + index * strides.m * strides.d, s.q,
      s.weights, s.f);
  SetFarBias(far.anchor, FeatureBias<Acc>(params.queries, head, dims), strides, s.far_bias);
  const Acc norm = params.attributes.query_norm
                       ? kLog2e<Acc> * map.scale / 2 * SquaredNorm<Acc>(s.q, strides.d_pad)
                       : Acc(0);
  Acc shift, den;
  DecodedWeights(strides, near.n, norm, far.mass, s, &shift, &den);
  DecodedOutput(strides, near, far, s);
  const Acc inverse = Inverse(den);
  for (int64_t e = 0; e < strides.e; ++e) s.out[e] = inverse == 0 ? Acc(0) : s.out[e] * inverse;
  StoreRows<Acc>({params.out, params.dtype, dims.heads, head, strides.e}, sequence, 1, s.out,
                 strides.e_pad);
  static_cast<Acc*>(params.log_weight)[sequence * dims.heads + head] =
      den == 0 ? -kInf<Acc> : kLn2<Acc> * (shift + Log2(den));
}

// A sequence and key/value head with one query.
template <class Acc>
bool DecodeNearFar(const NearFarParams& params, WorkRange range) {
  const Strides strides = MakeStrides<Acc>(params.dims);
  const Map<Acc> map(params);
  const Blocks blocks(params, range);
  const int64_t last = blocks.count() - 1, first = blocks.Begin(last > 0 ? last - 1 : 0);
  const int64_t n = range.end - first;  // near keys
  Arena arena;
  NearFarDecodeScratch<Acc> s;
  const int64_t most = n > blocks.MaxRows() ? n : blocks.MaxRows();
  if (!arena.Allocate([&] { s.SetPointers(arena, strides, most); })) return false;
  Prefetcher prefetcher;
  DecodedState<Acc> state(params, range, strides);
  for (int64_t block = 0; block + 1 < last; ++block)
    if (!state.Add(blocks.Begin(block), blocks.End(block) - blocks.Begin(block), s.keys,
                   &prefetcher))
      return false;

  s.keys.LoadBias(params, params.keys, range, first, n);
  const auto rows = [&](const ConstRows& tensor, int64_t width, Acc* copy) {
    return LoadLeft<Acc, Acc>(tensor, first, n, width, copy, static_cast<Acc*>(nullptr),
                              &prefetcher);
  };
  const NearRows<Acc> near = {
      n, rows(KeyChunk<Acc>::Keys(params, params.keys, range), strides.d_pad, s.keys.k),
      rows(KeyChunk<Acc>::Values(params, params.keys, range), strides.e_pad, s.keys.v),
      s.keys.offset, s.keys.skip};
  const FarSums<Acc> far = state.Sums(s.anchor, s.mass);
  const int64_t group = GroupSize(params.dims);
  for (int64_t head = range.head * group; head < (range.head + 1) * group; ++head)
    DecodeNearFarHead(params, range.sequence, head, strides, map, near, far, &prefetcher, s);
  if (blocks.FinalBlocks() == last && last > 0 &&
      !state.Add(first, blocks.End(last - 1) - first, s.keys, &prefetcher))
    return false;
  state.Store();
  return true;
}

PERFORMER_ISA_END
