// Causal attention: out[i] = sum_{j <= i} A[i, j] v[j] / sum_{j <= i} A[i, j], in chunks, with a
// running state.
//
// The keys are a chain of sub-chunks (causal_keys.h); the queries of a sub-chunk need of it the key weights
// kb, the values, and the state before it:
//   f[i][m] = 2^(a + anchor - shift_i)      local = tril(f kb)
//   out = (f sum + local v) / (f mass + row sums of local)
// So they may follow each sub-chunk at once, or later, from a window of sub-chunks, by other threads: the
// arithmetic is the same.
#pragma once
#include "cpu/kernels/causal_keys.h"
#include "cpu/kernels/read.h"
#include "cpu/simd/triangle.h"

PERFORMER_ISA_BEGIN

template <class Acc>
struct QueryScratch {
  static constexpr int64_t C = kCausalChunk, kLocalStride = C + kPad<Acc>;
  Ahead ahead;
  Acc *q, *f, *local, *out;        // [C][d_pad], [C][m_stride], [C][kLocalStride], [C][e_pad]
  Acc *bias, *tops, *shift, *den;  // [m_pad], [C][kLanes], [C], [C]

  void Place(Arena& arena, const Widths& w) {
    q = arena.Take<Acc>(C * w.d_pad);
    f = arena.Take<Acc>(C * w.m_stride);
    local = arena.Take<Acc>(C * kLocalStride);
    out = arena.Take<Acc>(C * w.e_pad);
    bias = arena.Take<Acc>(w.m_pad);
    tops = arena.Take<Acc>(C * kLanes<Acc>);
    shift = arena.Take<Acc>(C);
    den = arena.Take<Acc>(C);
  }
};

// local[i][j] = f[i] . kb[:, j] for the keys j <= piece.begin + i; den[i] += their sum.
template <class Acc>
void SubChunkLocal(const CausalSubChunk<Acc>& sub_chunk, const Widths& w, QueryScratch<Acc>& s) {
  constexpr int64_t kStride = QueryScratch<Acc>::kLocalStride;
  LowerProduct(s.f, w.m_stride, sub_chunk.kb, s.C, w.m, sub_chunk.rows, sub_chunk.begin, s.local,
               kStride);
  for (int64_t i = 0; i < sub_chunk.rows; ++i) {
    Acc* row = s.local + i * kStride;
    const int64_t last = sub_chunk.begin + i, stop = RoundUp(last + 1, kLanes<Acc>);
    for (int64_t j = last + 1; j < stop; ++j) row[j] = 0;
    Vec<Acc> sum = {};
    for (int64_t j = sub_chunk.begin / kLanes<Acc> * kLanes<Acc>; j < stop; j += kLanes<Acc>)
      sum += Load(row + j);
    s.den[i] += ReduceAdd<Acc>(sum);
  }
}

// Queries of one head for the rows of a piece.
template <class Acc>
void SubChunkQueries(const CausalParams& params, const Acc* projections, const Map<Acc>& map,
                     const Widths& w, int64_t query_head, const CausalSubChunk<Acc>& sub_chunk,
                     QueryScratch<Acc>& s) {
  constexpr int64_t kStride = QueryScratch<Acc>::kLocalStride;
  const int64_t rows = sub_chunk.rows;
  if (sub_chunk.blind) {
    for (int64_t i = 0; i < rows * w.e_pad; ++i) s.out[i] = 0;
  } else {
    const QueryHead<Acc> head(params, params.queries, projections, w, query_head);
    LoadRows<Acc>({params.queries.query, params.dtype, params.dims.heads, query_head, w.d},
                  sub_chunk.row, rows, nullptr, s.q, w.d_pad, &s.ahead);
    SetBias(sub_chunk.anchor, 1.0, head.feature_bias, w, s.bias);
    QueryLogFeatures(map, {s.q, w.d_pad, 1}, rows, head.projection, w, s.bias, s.f,
                     static_cast<Acc*>(nullptr), s.tops, &s.ahead);
    QueryWeights<true>(rows, w, s.bias, sub_chunk.mass, s.tops, s.f, s.shift, s.den);
    SubChunkLocal(sub_chunk, w, s);
    PrefixProduct(s.f, w.m_stride, sub_chunk.sum, w.e_pad, w.m, s.local + sub_chunk.begin, kStride,
                  sub_chunk.v, w.e_pad, s.out, w.e_pad, rows, w.e_pad);
    ScaleRows(rows, w.e_pad, s.den, s.out);
  }
  StoreRows<Acc>({params.out, params.dtype, params.dims.heads, query_head, w.e}, sub_chunk.row,
                 rows, s.out, w.e_pad);
}

// A whole sequence and key/value head, the queries of each sub-chunk at once.
template <class Acc>
bool Causal(const CausalParams& params, const Acc* query_projection, const Acc* key_projection,
            Slice slice) {
  const Widths w = MakeWidths<Acc>(params.dims);
  const Map<Acc> map(params);
  KeyChain<Acc> chain(params, key_projection, slice);
  Arena arena;
  QueryScratch<Acc> s;
  Acc *state, *kb;
  const auto place = [&] {
    chain.Place(arena);
    s.Place(arena, w);
    state = arena.Take<Acc>(SummaryPartial<Acc>::Size(w));
    kb = arena.Take<Acc>(w.m * kCausalChunk);
  };
  place();
  if (!arena.Allocate()) return false;
  place();
  const auto before = SummaryPartial<Acc>::At(state, w);
  chain.Start(slice.begin, before);
  const int64_t group = GroupSize(params.dims);
  for (CausalSubChunk<Acc> sub_chunk; chain.Next(kb, &sub_chunk); chain.Add(sub_chunk, before))
    for (int64_t h = slice.head * group; h < (slice.head + 1) * group; ++h)
      SubChunkQueries(params, query_projection, map, w, h, sub_chunk, s);
  chain.Finish();
  return true;
}

// The next window of a chain.
template <class Acc>
bool CausalKeys(const CausalParams& params, const Acc* projection, CausalChain<Acc>* at,
                CausalWindow<Acc>* window) {
  const Widths w = MakeWidths<Acc>(params.dims);
  KeyChain<Acc> chain(params, projection, at->slice);
  Arena arena;
  chain.Place(arena);
  if (!arena.Allocate()) return false;
  chain.Place(arena);
  // The state before each sub-chunk stays in its slot; only the one before the first is copied.
  const SummaryPartial<Acc> first = window->At(0, w).state;
  if (at->row > at->slice.begin) PrefixState<Acc>(at->state).CopyTo(PrefixState<Acc>(first), w);
  chain.Start(at->row, first);
  int64_t i = 0;
  for (; i < window->slots; ++i) {
    const auto slot = window->At(i, w);
    CausalSubChunk<Acc>& sub_chunk = window->sub_chunks[i];
    if (!chain.Next(slot.kb, &sub_chunk)) break;
    Copy(sub_chunk.v, sub_chunk.rows * w.e_pad, slot.v);
    sub_chunk.v = slot.v;
    chain.Add(sub_chunk, i + 1 < window->slots ? window->At(i + 1, w).state : at->state);
  }
  window->count = i;
  at->row = chain.row();
  at->done = at->row == at->slice.end;
  if (at->done) chain.Finish();
  return true;
}

// Queries of the window, one sub-chunk and head at a time, as long as there are some that nobody has
// taken.
template <class Acc>
bool CausalQueries(const CausalParams& params, const Acc* projection, int64_t group_head,
                   CausalWindow<Acc>* window) {
  const Widths w = MakeWidths<Acc>(params.dims);
  const Map<Acc> map(params);
  const int64_t group = GroupSize(params.dims);
  Arena arena;
  QueryScratch<Acc> s;
  s.Place(arena, w);
  if (!arena.Allocate()) return false;
  s.Place(arena, w);
  for (int64_t i = window->Take(); i < window->count * group; i = window->Take())
    SubChunkQueries(params, projection, map, w, group_head * group + i % group,
                    window->sub_chunks[i / group], s);
  return true;
}

PERFORMER_ISA_END
