// Causal attention: out[i] = sum_{j <= i} A[i, j] v[j] / sum_{j <= i} A[i, j], in chunks, with a
// running state.
//
// The keys are a chain of sub-chunks (key_chain.h). The queries of a sub-chunk need its key
// features p, its values, and the state before it:
//   f[i][m] = 2^(a + anchor - shift_i)      scores = tril(f p)
//   out = (f sum + scores v) / (f mass + row sums of scores)
// In steep sub-chunks f and scores are made in another way (steep.h).
// So they may follow each sub-chunk at once, or later, from a window of sub-chunks and on other
// threads: the arithmetic is the same.
#pragma once
#include "cpu/kernels/causal/steep.h"
#include "cpu/kernels/query_chunk.h"
#include "cpu/simd/triangle.h"

PERFORMER_ISA_BEGIN

template <class Acc, class In>
struct QueryScratch {
  static constexpr int64_t C = kCausalChunk, kScoreStride = C + kPad<Acc>;
  Prefetcher prefetcher;
  QueryChunk<Acc> queries;
  Acc *scores, *out;    // [C][kScoreStride], [C][e_pad]
  In *q_left, *f_left;  // copies for q, f as operands
  StateOperands<Acc, In> state;

  void SetPointers(Arena& arena, const Strides& strides) {
    q_left = TakeOperand<Acc, In>(arena, C * strides.d_pad);
    f_left = TakeOperand<Acc, In>(arena, C * strides.m_stride);
    state.SetPointers(arena, strides);
    queries.SetPointers(arena, strides, C);
    scores = arena.Take<Acc>(C * kScoreStride);
    out = arena.Take<Acc>(C * strides.e_pad);
  }
};

// scores[i][j] = f[i] . p[:, j] for the keys j <= sub_chunk.begin + i; den[i] += their sum.
template <class In, class Acc, class Scratch>
void SubChunkScores(const CausalSubChunk<Acc>& sub_chunk, const Left<In>& f, const Strides& strides,
                    Scratch& s) {
  constexpr int64_t kStride = Scratch::kScoreStride;
  LowerProduct(f.data, f.row_stride, reinterpret_cast<const In*>(sub_chunk.key_features), s.C,
               Operands<Acc, In>::Depth(strides.m), sub_chunk.rows, sub_chunk.begin, s.scores,
               kStride);
  for (int64_t i = 0; i < sub_chunk.rows; ++i) {
    Acc* row = s.scores + i * kStride;
    const int64_t last = sub_chunk.begin + i, stop = RoundUp(last + 1, kLanes<Acc>);
    for (int64_t j = last + 1; j < stop; ++j) row[j] = 0;
    Vec<Acc> sum = {};
    for (int64_t j = sub_chunk.begin / kLanes<Acc> * kLanes<Acc>; j < stop; j += kLanes<Acc>)
      sum += Load(row + j);
    s.queries.den[i] += ReduceAdd<Acc>(sum);
  }
}

// out of a sub-chunk, before the division by den, from f, the state and scores.
template <class In, class Acc, class Scratch>
void SubChunkOut(const CausalSubChunk<Acc>& sub_chunk, const Left<In>& f, const Right<In>& values,
                 const Strides& strides, Scratch& s) {
  CausalProduct(f.data, f.row_stride, values.data, values.stride,
                Operands<Acc, In>::Depth(strides.m), s.scores + sub_chunk.begin,
                Scratch::kScoreStride, sub_chunk.v, strides.e_pad, s.out, strides.e_pad,
                sub_chunk.rows, strides.e_pad);
}

// out and den of a sub-chunk that is not steep, with products of type In.
template <class In, class Acc, class Scratch>
void AnchoredQueries(const CausalParams& params, const Acc* projections, const Map<Acc>& map,
                     const Strides& strides, int64_t query_head,
                     const CausalSubChunk<Acc>& sub_chunk, StateOperands<Acc, In>& state,
                     Scratch& s) {
  const QueryHead<Acc, In> head(params, params.queries,
                                CausalProjection<Acc, In>::OperandsAt(projections, strides),
                                strides, query_head);
  const ConstRows queries = {params.queries.query, params.dtype, params.dims.heads, query_head,
                             strides.d};
  const Left<In> q = LoadLeft(queries, sub_chunk.row, sub_chunk.rows, strides.d_pad, s.queries.q,
                              reinterpret_cast<In*>(s.q_left), &s.prefetcher);
  state.Set(sub_chunk, strides);
  SetBias(state.log_weight, 1.0, head.feature_bias, strides, s.queries.bias);
  ComputeQueryFeatures<true>(map, q, sub_chunk.rows, head.projection, strides, state.weight,
                             static_cast<Acc*>(nullptr), s.queries, &s.prefetcher);
  const Left<In> f = Operands<Acc, In>::MakeLeft(s.queries.f, sub_chunk.rows, strides.m_pad,
                                                 strides.m_stride, reinterpret_cast<In*>(s.f_left));
  SubChunkScores(sub_chunk, f, strides, s);
  SubChunkOut(sub_chunk, f, state.values, strides, s);
}

// The same of a steep one.
template <class Acc, class Scratch>
void SteepSubChunkQueries(const CausalParams& params, const Acc* projections, const Map<Acc>& map,
                          const Strides& strides, int64_t query_head,
                          const CausalSubChunk<Acc>& sub_chunk, Scratch& s) {
  const QueryHead<Acc> head(params, params.queries, projections, strides, query_head);
  LoadRows<Acc>({params.queries.query, params.dtype, params.dims.heads, query_head, strides.d},
                sub_chunk.row, sub_chunk.rows, nullptr, s.queries.q, strides.d_pad, &s.prefetcher);
  SteepQueries(map, strides, head, sub_chunk, s.queries, s.scores, Scratch::kScoreStride,
               &s.prefetcher);
  SubChunkOut(sub_chunk, Left<Acc>{s.queries.f, strides.m_stride, 1},
              Right<Acc>{sub_chunk.sum, strides.e_pad}, strides, s);
}

// Rows of out of one query head for the rows of a sub-chunk.
template <class Acc, class In>
void SubChunkQueries(const CausalParams& params, const Acc* projections, const Map<Acc>& map,
                     const Strides& strides, int64_t query_head,
                     const CausalSubChunk<Acc>& sub_chunk, QueryScratch<Acc, In>& s) {
  const int64_t rows = sub_chunk.rows;
  if (sub_chunk.fully_masked) {
    for (int64_t i = 0; i < rows * strides.e_pad; ++i) s.out[i] = 0;
  } else {
    if (sub_chunk.steep) {
      SteepSubChunkQueries(params, projections, map, strides, query_head, sub_chunk, s);
    } else if (sub_chunk.paired) {
      AnchoredQueries(params, projections, map, strides, query_head, sub_chunk, s.state, s);
    } else {
      StateOperands<Acc, Acc> state;
      AnchoredQueries(params, projections, map, strides, query_head, sub_chunk, state, s);
    }
    ScaleRows(rows, strides.e_pad, s.queries.den, s.out);
  }
  StoreRows<Acc>({params.out, params.dtype, params.dims.heads, query_head, strides.e},
                 sub_chunk.row, rows, s.out, strides.e_pad);
}

// A whole sequence and key/value head; the queries of each sub-chunk follow at once.
template <class Acc, class In>
bool Causal(const CausalParams& params, const Acc* query_projection, const Acc* key_projection,
            WorkRange range) {
  const Strides strides = MakeStrides<Acc>(params.dims);
  const Map<Acc> map(params);
  KeyChain<Acc, In> chain(params, key_projection, range);
  Arena arena;
  QueryScratch<Acc, In> s;
  Acc *state, *key_features;  // [SummaryPartial::Size], [m][kCausalChunk]
  const bool allocated = arena.Allocate([&] {
    chain.SetPointers(arena);
    s.SetPointers(arena, strides);
    state = arena.Take<Acc>(SummaryPartial<Acc>::Size(strides));
    key_features = arena.Take<Acc>(strides.m * kCausalChunk);
  });
  if (!allocated) return false;
  const auto before = SummaryPartial<Acc>::At(state, strides);
  chain.Start(range.begin, before);
  const int64_t group = GroupSize(params.dims);
  for (CausalSubChunk<Acc> sub_chunk; chain.Next(key_features, &sub_chunk);
       chain.Add(sub_chunk, before))
    for (int64_t h = range.head * group; h < (range.head + 1) * group; ++h)
      SubChunkQueries(params, query_projection, map, strides, h, sub_chunk, s);
  chain.Finish();
  return true;
}

// Keys of the chain into its next window.
template <class Acc, class In>
bool CausalKeys(const CausalParams& params, const Acc* projection, CausalChain<Acc>* at,
                CausalWindow<Acc>* window) {
  const Strides strides = MakeStrides<Acc>(params.dims);
  KeyChain<Acc, In> chain(params, projection, at->range);
  Arena arena;
  if (!arena.Allocate([&] { chain.SetPointers(arena); })) return false;
  // The state before each sub-chunk stays in its slot; only the state before the first is copied.
  const SummaryPartial<Acc> first = window->At(0, strides).state;
  if (at->row > at->range.begin)
    ForwardState<Acc>(at->state).CopyTo(ForwardState<Acc>(first), strides);
  chain.Start(at->row, first);
  int64_t i = 0;
  for (; i < window->slots; ++i) {
    const auto slot = window->At(i, strides);
    CausalSubChunk<Acc>& sub_chunk = window->sub_chunks[i];
    if (!chain.Next(slot.key_features, &sub_chunk)) break;
    Copy(sub_chunk.v, sub_chunk.rows * strides.e_pad, slot.v);
    sub_chunk.v = slot.v;
    chain.Add(sub_chunk, i + 1 < window->slots ? window->At(i + 1, strides).state : at->state);
  }
  window->count = i;
  at->row = chain.row();
  at->done = at->row == at->range.end;
  if (at->done) chain.Finish();
  return true;
}

// Queries of the window, one sub-chunk and query head at a time, as long as there are some that no
// other thread has taken.
template <class Acc, class In>
bool CausalQueries(const CausalParams& params, const Acc* projection, int64_t group_head,
                   CausalWindow<Acc>* window) {
  const Strides strides = MakeStrides<Acc>(params.dims);
  const Map<Acc> map(params);
  const int64_t group = GroupSize(params.dims);
  Arena arena;
  QueryScratch<Acc, In> s;
  if (!arena.Allocate([&] { s.SetPointers(arena, strides); })) return false;
  for (int64_t i = window->Take(); i < window->count * group; i = window->Take())
    SubChunkQueries(params, projection, map, strides, group_head * group + i % group,
                    window->sub_chunks[i / group], s);
  return true;
}

PERFORMER_ISA_END
