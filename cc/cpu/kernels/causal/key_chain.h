// The keys of causal attention: a chain that makes the sub-chunks of a sequence one after another,
// each with the state before it.
//   p[m][j] = 2^(b - anchor[m])      sum += p v      mass += row sums of p
// The key features p are made transposed, [m][C], so that both f p and p v read rows of their right
// operand. An anchor is the running reference maximum of a feature: sums are relative to 2^anchor.
//
// No later key changes a bit of an earlier row, for these reasons. Boundaries of chunks are fixed.
// A chunk is processed in sub-chunks, nearly always one. The anchors of a sub-chunk come from the
// past and from the key of its first row. A sub-chunk ends before any later key that exceeds an
// anchor by more than kCutBits, and rows before the cut do the same arithmetic with or without it.
// Products end at the row itself (triangle.h).
//
// What follows the first cut of a chunk is one steep sub-chunk. There may be keys of which each
// outweighs all before, so that anchors would serve for one row only. So no anchor is shared there:
// each pair of a query and a key has its own powers of 2, relative to the maximum of the query's
// row (steep.h). The number of sub-chunks of a chunk is bounded, whatever the keys hold.
#pragma once
#include "core/causal_cut.h"
#include "cpu/kernels/causal/operands.h"
#include "cpu/kernels/causal/sub_chunks.h"
#include "cpu/kernels/key_chunk.h"
#include "cpu/kernels/state.h"

PERFORMER_ISA_BEGIN

template <class Acc>
constexpr Acc kCutBits = kCausalCutBits;
// An anchor is raised, and its sums rescaled, when the mass relative to it exceeds this.
template <class Acc>
constexpr Acc kRescaleThreshold = static_cast<Acc>(0x1p30);

template <class Acc>
PERFORMER_INLINE void Copy(const Acc* from, int64_t count, Acc* to) {
  for (int64_t i = 0; i < count; i += kLanes<Acc>) Store(to + i, Load(from + i));
}

// The forward state as sums relative to 2^anchor, in memory of its owner. An anchor of -inf means
// that the feature has seen no key.
template <class Acc>
struct ForwardState {
  Acc* sum = nullptr;     // [m][e_pad]
  Acc* mass = nullptr;    // [m_pad]
  Acc* anchor = nullptr;  // [m_pad]

  ForwardState() = default;
  explicit ForwardState(const SummaryPartial<Acc>& at)
      : sum(at.sum), mass(at.mass), anchor(at.anchor) {}

  void Set(const LoadedState<Acc>& state, const Strides& strides) {
    state.CopyMean(strides, sum);
    for (int64_t m = 0; m < strides.m_pad; ++m) {
      anchor[m] = m < strides.m ? static_cast<Acc>(state.Log2Mass(m)) : kInf<Acc>;
      mass[m] = m < strides.m && anchor[m] != -kInf<Acc> ? 1 : 0;
    }
  }
  bool IsEmpty(const Strides& strides) const {
    for (int64_t m = 0; m < strides.m; ++m)
      if (anchor[m] != -kInf<Acc>) return false;
    return true;
  }
  void Raise(int64_t m, Acc to, const Strides& strides) {
    const Acc keep = Exp2(anchor[m] - to);  // 0 where the anchor was -inf
    Acc* row = sum + m * strides.e_pad;
    for (int64_t e = 0; e < strides.e_pad; e += kLanes<Acc>)
      Store(row + e, WithoutDenormals<Acc>(Load(row + e) * keep));
    mass[m] *= keep;
    anchor[m] = to;
  }
  void CopyTo(const ForwardState& to, const Strides& strides) const {
    Copy(sum, strides.m * strides.e_pad, to.sum);
    Copy(mass, strides.m_pad, to.mass);
    Copy(anchor, strides.m_pad, to.anchor);
  }
};

// A chunk of keys, and the state before its next sub-chunk.
template <class Acc>
struct KeyScratch {
  static constexpr int64_t C = kCausalChunk;
  static_assert(C % kPad<Acc> == 0);
  Prefetcher prefetcher;
  KeyChunk<Acc> keys;
  ForwardState<Acc> state;
  Acc* b;               // [m][C]: log-features
  Acc* sub_chunk_mass;  // [m]: row sums of p
  // Sums of the keys of this call alone, relative to the anchors of `state`; in short calls only,
  // otherwise nullptr.
  Acc *own_sum, *own_mass;  // [m][e_pad], [m_pad]

  void SetPointers(Arena& arena, const Strides& strides, bool is_short) {
    keys.SetPointers(arena, strides, C);
    b = arena.Take<Acc>(strides.m * C);
    sub_chunk_mass = arena.Take<Acc>(strides.m);
    own_sum = is_short ? arena.Take<Acc>(strides.m * strides.e_pad) : nullptr;
    own_mass = is_short ? arena.Take<Acc>(strides.m_pad) : nullptr;
  }
  void StartOwn(const Strides& strides) {
    if (own_sum == nullptr) return;
    for (int64_t i = 0; i < strides.m * strides.e_pad; ++i) own_sum[i] = 0;
    for (int64_t m = 0; m < strides.m_pad; ++m) own_mass[m] = 0;
  }
  // Raises the anchor of feature m of `at`, and rescales what is relative to it.
  void Raise(int64_t m, Acc to, const Strides& strides, ForwardState<Acc>& at) {
    if (own_sum != nullptr) {
      const Acc keep = Exp2(at.anchor[m] - to);
      for (int64_t e = m * strides.e_pad; e < (m + 1) * strides.e_pad; ++e) own_sum[e] *= keep;
      own_mass[m] *= keep;
    }
    at.Raise(m, to, strides);
  }
};

// b[m][j] of the n keys of a chunk; the columns behind them, up to a whole vector, are -inf.
template <class Acc, class In>
void KeyLogFeatures(const Map<Acc>& map, const CausalProjection<Acc, In>& projection,
                    const Strides& strides, int64_t n, KeyScratch<Acc>& s,
                    const KeyOperands<Acc, In>& operands) {
  using Operand = Operands<Acc, In>;
  constexpr int64_t C = KeyScratch<Acc>::C;
  const int64_t width = RoundUp(n, kLanes<Acc>);
  for (int64_t j = n; j < RoundUp(n, kPad<Acc>); ++j) {
    s.keys.offset[j] = -kInf<Acc>;
    s.keys.skip[j] = 1;
    for (int64_t d = 0; d < strides.d_pad; ++d) s.keys.k[j * strides.d_pad + d] = 0;
  }
  const int64_t rows = RoundUp(width, 4), depth = Operand::Depth(strides.d);
  const Left<In> k =
      Operand::MakeLeft(s.keys.k, rows, strides.d_pad, strides.d_pad, operands.k_left);
  Transpose(k.data, k.row_stride, rows, Operand::Depth(strides.d_pad), operands.k_right, C);
  s.prefetcher.Divide(HookCalls<Acc>(strides.m, depth, width));
  MatMul<false>(projection.rows.data, projection.rows.row_stride, 1, operands.k_right, C, depth,
                s.b, C, strides.m, width, &s.prefetcher, projection.scale);
  ApplyMap<Acc>(map, strides.m, width, C, s.b, nullptr);
  for (int64_t m = 0; m < strides.m; ++m)
    for (int64_t j = 0; j < width; j += kLanes<Acc>)
      Store(s.b + m * C + j, Load(s.b + m * C + j) + Load(s.keys.offset + j));
}

// Sets the anchors for a sub-chunk that begins at an unmasked row, from the past and from that row.
template <class Acc>
void AnchorSubChunk(int64_t begin, const Strides& strides, KeyScratch<Acc>& s) {
  const Acc* column = s.b + begin;
  bool exceeds = false;
  for (int64_t m = 0; m < strides.m; ++m)
    exceeds |= column[m * s.C] > s.state.anchor[m] + kCutBits<Acc>;
  if (!exceeds) return;
  for (int64_t m = 0; m < strides.m; ++m)
    if (column[m * s.C] > s.state.anchor[m]) s.Raise(m, column[m * s.C], strides, s.state);
}

// The columns [begin, end) of a chunk.
template <class Acc>
class Columns {
 public:
  static constexpr int64_t kCount = KeyScratch<Acc>::C;

  Columns(int64_t begin, int64_t end)
      : begin_(begin), end_(end), first_(begin / kLanes<Acc> * kLanes<Acc>) {
    for (int64_t j = 0; j < kCount; ++j) index_[j] = static_cast<Acc>(j);
  }
  // Calls f(j, inside) for the vectors that they lie in; inside: all ones in their lanes.
  template <class F>
  PERFORMER_INLINE void ForEach(F f) const {
    for (int64_t j = first_; j < end_; j += kLanes<Acc>)
      f(j, (Load(index_ + j) >= static_cast<Acc>(begin_)) &
               (Load(index_ + j) < static_cast<Acc>(end_)));
  }

 private:
  const int64_t begin_, end_, first_;
  alignas(kAlignment) Acc index_[kCount];
};

// The first row in (begin, n) whose key exceeds an anchor by more than kCutBits, or n.
template <class Acc>
int64_t SubChunkEnd(int64_t begin, int64_t n, const Strides& strides, const KeyScratch<Acc>& s) {
  constexpr int64_t C = KeyScratch<Acc>::C, kVecs = C / kLanes<Acc>;
  IntVec<Acc> exceeds[kVecs] = {};
  for (int64_t m = 0; m < strides.m; ++m) {
    const Vec<Acc> limit = Splat(s.state.anchor[m] + kCutBits<Acc>);
    for (int64_t i = 0; i < kVecs && i * kLanes<Acc> < n; ++i)
      exceeds[i] |= Load(s.b + m * C + i * kLanes<Acc>) > limit;
  }
  for (int64_t j = begin + 1; j < n; ++j)
    if (exceeds[j / kLanes<Acc>][j % kLanes<Acc>]) return j;
  return n;
}

// p [m][C] and its row sums for the columns [first, last), which may replace the log-features. The
// others of their vectors become 0, whatever these keys hold.
template <bool kSteep = false, class Acc>
void SubChunkKeyFeatures(int64_t first, int64_t last, const Strides& strides, Acc* key_features,
                         KeyScratch<Acc>& s) {
  constexpr int64_t C = KeyScratch<Acc>::C;
  const Columns<Acc> columns(first, last);
  for (int64_t m = 0; m < strides.m; ++m) {
    const Acc anchor = s.state.anchor[m] == -kInf<Acc> ? Acc(0) : s.state.anchor[m];
    Vec<Acc> sum = {};
    const Vec<Acc> zero = {};
    columns.ForEach([&](int64_t j, IntVec<Acc> inside) {
      const Vec<Acc> x = Load(s.b + m * C + j) - anchor;
      const Vec<Acc> y = inside ? (kSteep ? Exp2Normal<Acc>(x) : Exp2(x)) : zero;
      Store(key_features + m * C + j, y);
      sum += y;
    });
    s.sub_chunk_mass[m] = ReduceAdd<Acc>(sum);
  }
}

#if defined(__AVX512BF16__)
// The same for the first n columns of a chunk, as operands: for the scores over the mass.
inline void PairedKeyFeatures(int64_t n, const Strides& strides, Pair* key_features,
                              KeyScratch<float>& s, const KeyOperands<float, Pair>& operands) {
  constexpr int64_t C = KeyScratch<float>::C;
  const Columns<float> columns(0, n);
  const Vec<float> zero = {};
  for (int64_t m = 0; m < strides.m; m += 2) {
    const bool both = m + 1 < strides.m;
    const auto anchor_of = [&](int64_t i) {
      return s.state.anchor[i] == -kInf<float> ? 0.0f : s.state.anchor[i];
    };
    const float first = anchor_of(m), second = both ? anchor_of(m + 1) : 0.0f;
    const float per_mass[] = {OverMass(s.state.mass[m]), both ? OverMass(s.state.mass[m + 1]) : 0};
    Vec<float> sum[2] = {};
    columns.ForEach([&](int64_t j, IntVec<float> inside) {
      const Vec<float> x = Exp2(Load(s.b + m * C + j) - first), p = inside ? x : zero;
      Vec<float> q = zero;
      if (both) {
        const Vec<float> y = Exp2(Load(s.b + (m + 1) * C + j) - second);
        q = inside ? y : zero;
      }
      sum[0] += p;
      sum[1] += q;
      const auto narrow = [](Vec<float> high, Vec<float> low) {
        return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
      };
      _mm512_storeu_si512(key_features + m / 2 * C + j,
                          Interleaved(narrow(q * per_mass[1], p * per_mass[0])));
      const __m512i halves = narrow(q, p);
      Pair* left = operands.features_left + (m * C + j) / 2;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(left), _mm512_castsi512_si256(halves));
      if (both)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(left + C / 2),
                            _mm512_extracti64x4_epi64(halves, 1));
    });
    s.sub_chunk_mass[m] = ReduceAdd<float>(sum[0]);
    if (both) s.sub_chunk_mass[m + 1] = ReduceAdd<float>(sum[1]);
  }
}
#endif

// The log-features of the columns [first, last), -inf in the others of their vectors.
template <class Acc>
void CopyKeyLogFeatures(int64_t first, int64_t last, const Strides& strides, Acc* to,
                        const KeyScratch<Acc>& s) {
  constexpr int64_t C = KeyScratch<Acc>::C;
  const Columns<Acc> columns(first, last);
  const Vec<Acc> nothing = Splat(-kInf<Acc>);
  for (int64_t m = 0; m < strides.m; ++m)
    columns.ForEach([&](int64_t j, IntVec<Acc> inside) {
      Store(to + m * C + j, inside ? Load(s.b + m * C + j) : nothing);
    });
}

// next = the state with the keys of a sub-chunk added; it may lie in the same memory.
template <class In, class Acc>
void SubChunkUpdate(const Left<In>& features, const Right<In>& v, int64_t rows,
                    const Strides& strides, KeyScratch<Acc>& s, ForwardState<Acc>& next) {
  const auto add = [&](const Acc* from, Acc* to) {
    AddProduct(features.data, features.row_stride, 1, v.data, v.stride,
               Operands<Acc, In>::Depth(rows), from, to, strides.e_pad, strides.m, strides.e_pad);
  };
  add(s.state.sum, next.sum);
  if (s.own_sum != nullptr) {
    add(s.own_sum, s.own_sum);
    for (int64_t m = 0; m < strides.m; ++m) s.own_mass[m] += s.sub_chunk_mass[m];
  }
  for (int64_t m = 0; m < strides.m_pad; ++m) {
    next.anchor[m] = s.state.anchor[m];
    next.mass[m] = s.state.mass[m];
    if (m >= strides.m) continue;
    next.mass[m] += s.sub_chunk_mass[m];
    if (next.mass[m] > kRescaleThreshold<Acc>)
      s.Raise(m, next.anchor[m] + Log2(next.mass[m]), strides, next);
  }
}

template <class Acc>
void SubChunkUpdate(const CausalSubChunk<Acc>& sub_chunk, const Strides& strides,
                    KeyScratch<Acc>& s, ForwardState<Acc>& next) {
  const Left<Acc> features = {sub_chunk.key_features + sub_chunk.begin, s.C, 1};
  SubChunkUpdate(features, Right<Acc>{sub_chunk.v, strides.e_pad}, sub_chunk.rows, strides, s,
                 next);
}

// The same for a steep sub-chunk, whose keys first raise the anchors. Its log-features are lost.
template <class Acc>
void SteepSubChunkUpdate(CausalSubChunk<Acc> sub_chunk, const Strides& strides, KeyScratch<Acc>& s,
                         ForwardState<Acc>& next) {
  const int64_t end = sub_chunk.begin + sub_chunk.rows;
  if (next.sum != s.state.sum) s.state.CopyTo(next, strides);
  s.state = next;
  const Columns<Acc> columns(sub_chunk.begin, end);
  for (int64_t m = 0; m < strides.m; ++m) {
    Vec<Acc> highest = Splat(s.state.anchor[m]);
    columns.ForEach([&](int64_t j, IntVec<Acc> inside) {
      highest = inside ? Max(Load(s.b + m * s.C + j), highest) : highest;
    });
    const Acc raised = ReduceMax<Acc>(highest);
    if (raised > s.state.anchor[m]) s.Raise(m, raised, strides, s.state);
  }
  SubChunkKeyFeatures<true>(sub_chunk.begin, end, strides, s.b, s);
  sub_chunk.key_features = s.b;
  SubChunkUpdate(sub_chunk, strides, s, next);
}

// The chain of one sequence and key/value head:
//   while (chain.Next(key_features, &sub_chunk)) {
//     ...  // use the sub-chunk
//     chain.Add(sub_chunk, next_state);
//   }
// It may be left after any sub-chunk and continued by another object, with the same bits.
template <class Acc, class In>
class KeyChain {
 public:
  KeyChain(const CausalParams& params, const Acc* projections, const WorkRange& range)
      : params_(params),
        map_(params),
        range_(range),
        strides_(MakeStrides<Acc>(params.dims)),
        projection_(CausalProjection<Acc, In>::At(
            params.attributes,
            projections + KeyHeadIndex(params.keys.projection_heads, range.head) *
                              PackedProjection<Acc>::Size(strides_),
            strides_)) {}

  void SetPointers(Arena& arena) {
    operands_.SetPointers(arena, strides_);
    s_.SetPointers(arena, strides_, range_.end - range_.begin <= kMaxStreamRows);
  }

  // To be called before Next: the next sub-chunk begins at tensor row `row`, with the given state
  // before it. At the first row of the range that memory receives the initial state.
  void Start(int64_t row, SummaryPartial<Acc> state) {
    row_ = row;
    s_.state = ForwardState<Acc>(state);
    if (row != range_.begin) return;
    s_.state.Set(Initial(), strides_);
    s_.StartOwn(strides_);
  }

  // The next sub-chunk, with its key features in key_features [m][C]; false at the end of the
  // range. The sub-chunk points into the memory of the state and to rows that the next call
  // replaces.
  bool Next(Acc* key_features, CausalSubChunk<Acc>* sub_chunk) {
    if (row_ == range_.end) return false;
    const int64_t begin = (row_ - range_.begin) % kCausalChunk;
    if (begin == 0 || !loaded_) LoadChunk(row_ - begin);
    const bool masked = s_.keys.skip[begin], empty = s_.state.IsEmpty(strides_);
    const bool fully_masked = masked && empty, steep = begin > 0 && !empty,
               paired = kPaired && begin == 0 && !fully_masked;
    int64_t end = begin + 1;
    if (fully_masked) {
      while (end < chunk_rows_ && s_.keys.skip[end]) ++end;
    } else if (steep) {
      end = chunk_rows_;
      CopyKeyLogFeatures(begin, end, strides_, key_features, s_);
    } else {
      if (!masked) AnchorSubChunk(begin, strides_, s_);
      end = SubChunkEnd(begin, chunk_rows_, strides_, s_);
      if (paired) {
        MakePairs(end, key_features);
      } else {
        SubChunkKeyFeatures(begin, end, strides_, key_features, s_);
      }
    }
    *sub_chunk = {row_,
                  begin,
                  end - begin,
                  fully_masked,
                  steep,
                  paired,
                  s_.state.sum,
                  s_.state.mass,
                  s_.state.anchor,
                  key_features,
                  s_.keys.v + begin * strides_.e_pad};
    return true;
  }

  // Adds the keys of the sub-chunk to the state. The new state goes to `memory`, which may be that
  // of the state before it.
  void Add(const CausalSubChunk<Acc>& sub_chunk, const SummaryPartial<Acc>& memory) {
    ForwardState<Acc> next(memory);
    if (sub_chunk.steep) {
      SteepSubChunkUpdate(sub_chunk, strides_, s_, next);
    } else if (sub_chunk.paired) {
      const Left<In> features = {operands_.features_left, Operand::Depth(kCausalChunk), 1};
      SubChunkUpdate(features, Right<In>{operands_.v_right, strides_.e_pad}, sub_chunk.rows,
                     strides_, s_, next);
    } else if (!sub_chunk.fully_masked) {
      SubChunkUpdate(sub_chunk, strides_, s_, next);
    } else if (next.sum != s_.state.sum) {
      s_.state.CopyTo(next, strides_);
    }
    s_.state = next;
    row_ += sub_chunk.rows;
  }

  int64_t row() const { return row_; }

  // Writes the final state, at the end of the range.
  void Finish() const {
    const int64_t at = (range_.sequence * params_.dims.groups + range_.head) * strides_.m;
    Acc *log_mass = static_cast<Acc*>(params_.state.log_mass) + at,
        *mean = static_cast<Acc*>(params_.state.mean) + at * strides_.e;
    if (s_.own_sum != nullptr) {
      WriteNextState(strides_, Initial(), s_.state.anchor, s_.own_mass, s_.own_sum, log_mass, mean);
    } else {
      WriteState(strides_, s_.state.anchor, s_.state.mass, s_.state.sum, log_mass, mean);
    }
  }

 private:
  using Operand = Operands<Acc, In>;
  static constexpr bool kPaired = std::is_same_v<In, Pair>;

  // Key features and values of the first n rows of the chunk as operands.
  void MakePairs(int64_t n, Acc* key_features) {
    if constexpr (kPaired) {
      PairedKeyFeatures(n, strides_, reinterpret_cast<Pair*>(key_features), s_, operands_);
      Operand::MakeRight(s_.keys.v, n, strides_.e_pad, strides_.e_pad, operands_.v_right);
    }
  }
  LoadedState<Acc> Initial() const {
    return {params_.initial, params_.dims, range_.sequence, range_.head};
  }
  void LoadChunk(int64_t row) {
    chunk_rows_ = range_.end - row < kCausalChunk ? range_.end - row : kCausalChunk;
    s_.keys.Load(params_, params_.keys, map_, strides_, range_, row, chunk_rows_, &s_.prefetcher);
    KeyLogFeatures(map_, projection_, strides_, chunk_rows_, s_, operands_);
    loaded_ = true;
  }

  const CausalParams& params_;
  const Map<Acc> map_;
  const WorkRange range_;
  const Strides strides_;
  const CausalProjection<Acc, In> projection_;
  KeyScratch<Acc> s_;
  KeyOperands<Acc, In> operands_;
  int64_t row_ = 0, chunk_rows_ = 0;
  bool loaded_ = false;
};

PERFORMER_ISA_END
