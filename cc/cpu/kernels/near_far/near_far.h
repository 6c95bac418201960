// Near-and-far attention: near keys exactly, far keys by features, in one softmax.
//   s[i][j] = scale q.k + key_bias     near keys: those of the query's block and its neighbours
//   a[i][m] = w.q + feature_bias - |q|^2 / 2 - log M + anchor[m]    sums of far keys: mass, sum
//   out[i] = (sum_j e^s v + sum_m e^a sum[m]) / (sum_j e^s + sum_m e^a mass[m])
// both relative to one maximum of the row. As the state of far keys has whole blocks, all of them
// before the query if causal, no later key changes a bit of it, and anchors may come from a whole
// block at a time.
#pragma once
#include "cpu/kernels/near_far/far_states.h"
#include "cpu/kernels/near_far/logits.h"
#include "cpu/kernels/read.h"

PERFORMER_ISA_BEGIN

// One sequence and key/value head: its blocks, and the near keys of the block at hand. Params are
// those of the operator or of its gradient.
template <class Acc, class Params>
struct NearFarHead {
  NearFarHead(const Params& params, const Acc* query_projection, const Acc* key_projection,
              const WorkRange& range)
      : params(params),
        dims(params.dims),
        strides(MakeStrides<Acc>(params.dims)),
        map(params),
        range(range),
        blocks(params, range),
        query_projection(query_projection),
        key_projection(Operands<Acc, Acc>::Projection(
            params.attributes,
            key_projection + KeyHeadIndex(params.keys.projection_heads, range.head) *
                                 PackedProjection<Acc>::Size(strides),
            strides)) {}

  bool causal() const { return params.attributes.causal; }
  int NearBlocks() const { return causal() ? 2 : 3; }
  int64_t FirstHead() const { return range.head * GroupSize(dims); }
  LoadedState<Acc> Initial() const { return {params.initial, dims, range.sequence, range.head}; }
  QueryHead<Acc> Head(int64_t i) const {
    return {params, params.queries, query_projection, strides, FirstHead() + i};
  }

  void SetPointers(Arena& arena, bool with_value_panels) {
    for (KeyBlock<Acc>& block : key_blocks)
      block.SetPointers(arena, strides, blocks.MaxRows(), with_value_panels);
    summarizer.SetPointers(arena, strides, blocks.MaxRows());
  }
  KeyBlock<Acc>& At(int64_t block) { return key_blocks[block % 3]; }
  void LoadBlock(int64_t block, bool as_near = true) {
    const int64_t row = blocks.Begin(block);
    At(block).Load(params, params.keys, map, strides, range, row, blocks.End(block) - row, as_near,
                   centre, &prefetcher);
  }
  // Loads what a bidirectional block of queries needs besides the keys of the block before.
  void LoadNear(int64_t block) {
    if (block == 0) LoadBlock(0);
    if (block + 1 < blocks.count()) LoadBlock(block + 1);
  }
  void CentreOn(int64_t) {}  // values keep what they have in common; not so in gradients
  // Adds the keys of a block, which has been loaded, to a state; sets it if `first`.
  void Summarize(int64_t block, bool first, const SummaryPartial<Acc>& to) {
    summarizer.Add(map, At(block).keys, At(block).rows, key_projection, strides, first, &prefetcher,
                   to);
  }
  // The near keys of a block of queries, which have been loaded.
  NearKeys<Acc> Near(int64_t block) {
    NearKeys<Acc> near;
    for (int64_t b = block > 0 ? block - 1 : 0; b <= block + (causal() ? 0 : 1); ++b)
      if (b < blocks.count()) near.Add(At(b));
    return near;
  }
  NearFarContext<Acc> Context(const NearKeys<Acc>& near, const SummaryPartial<Acc>& state) const {
    return {map, strides, near, causal(), params.attributes.query_norm, !IsEmpty(strides, state)};
  }
  // body(rows) for every chunk of queries of a block.
  template <class Body>
  void ForQueries(int64_t block, int64_t chunk, Body body) const {
    const int64_t begin = blocks.Begin(block), end = blocks.End(block);
    for (int64_t row = blocks.FirstQuery(block); row < end; row += chunk)
      body(QueryRows{blocks.QueryRow(row), row - begin, end - row < chunk ? end - row : chunk});
  }
  ConstRows QueryTensor(int64_t i) const {
    return {params.queries.query, params.dtype, dims.heads, FirstHead() + i, strides.d};
  }

  const Params& params;
  const Dims& dims;
  const Strides strides;
  const Map<Acc> map;
  const WorkRange range;
  const Blocks blocks;
  const Acc* query_projection;  // [projection_heads][PackedProjection::Size]
  const ProjectionOperands<Acc, Acc> key_projection;
  KeyBlock<Acc> key_blocks[3];  // of block b at b % 3
  BlockSummarizer<Acc> summarizer;
  const Acc* centre = nullptr;  // [e_pad]: what values are less by, or nullptr
  Prefetcher prefetcher;
};

// The states of all blocks.
template <class Acc, class Head>
void SummarizeBlocks(Head& head, FarStates<Acc>& states) {
  head.prefetcher = Prefetcher(true);
  for (int64_t block = head.blocks.count() - 1; block >= 0; --block) {
    head.LoadBlock(block, false);
    head.CentreOn(block);
    head.Summarize(block, true, states.Block(block));
    states.Give(block);
  }
  head.prefetcher = Prefetcher();
}

template <class Acc>
struct NearFarScratch {
  QueryLogits<Acc> queries;
  Acc *shift, *den, *out;  // [chunk], [chunk], [chunk][e_pad]

  void SetPointers(Arena& arena, const Strides& strides, const Blocks& blocks, int near_blocks) {
    queries.SetPointers(arena, strides, blocks, near_blocks);
    shift = arena.Take<Acc>(queries.chunk);
    den = arena.Take<Acc>(queries.chunk);
    out = arena.Take<Acc>(queries.chunk * strides.e_pad);
  }
};

// Replaces logits by weights relative to the maximum of each row, and sums them to den.
template <class Acc>
void NearFarWeights(const NearFarContext<Acc>& context, const QueryRows& rows, const Acc* mass,
                    NearFarScratch<Acc>& scratch) {
  QueryLogits<Acc>& s = scratch.queries;
  for (int64_t i = 0; i < rows.n; ++i) {
    Acc *near = s.Near(i), *far = s.Far(i);
    Vec<Acc> highest = Splat(-kInf<Acc>);
    ForNearLogits(context, rows, s, i, [&](int64_t c, Vec<Acc> x) PERFORMER_TILE_BODY {
      Store(near + c, x);
      highest = Max(x, highest);
    });
    if (context.has_far) highest = Max(Load(s.row_max + i * kLanes<Acc>) - s.norm[i], highest);
    const Acc top = ReduceMax<Acc>(highest);
    const Acc shift = top == -kInf<Acc> ? Acc(0) : top;
    Vec<Acc> sum = {};
    for (int b = 0; b < context.near.count; ++b) {
      const int64_t first = context.near.column[b];
      const int64_t end = first + (context.IsTriangle(b) ? RoundUp(rows.at + i + 1, kLanes<Acc>)
                                                         : context.near.block[b]->columns());
      for (int64_t c = first; c < end; c += kLanes<Acc>) {
        const Vec<Acc> y = Exp2(Load(near + c) - shift);
        Store(near + c, y);
        sum += y;
      }
    }
    const Acc far_shift = shift + s.norm[i];
    for (int64_t m = 0; context.has_far && m < context.strides.m_pad; m += kLanes<Acc>) {
      const Vec<Acc> y = Exp2(Load(far + m) + Load(s.far_bias + m) - far_shift);
      Store(far + m, y);
      sum += y * Load(mass + m);
    }
    scratch.shift[i] = shift;
    scratch.den[i] = ReduceAdd<Acc>(sum);
  }
}

// Rows of out and log_weight of query head i of the group, for a block of queries.
template <class Acc>
void NearFarQueries(NearFarHead<Acc, NearFarParams>& head, int64_t block,
                    const NearFarContext<Acc>& context, const SummaryPartial<Acc>& state, int64_t i,
                    NearFarScratch<Acc>& s) {
  const Strides& strides = head.strides;
  const Dims& dims = head.dims;
  const NearFarParams& params = head.params;
  const QueryHead<Acc> query_head = head.Head(i);
  const int64_t index = head.FirstHead() + i;
  const MutableRows out = {params.out, params.dtype, dims.heads, index, strides.e};
  const bool in_place = out.dtype == kOwnType<Acc> && out.width == strides.e_pad;
  Acc* log_weight = static_cast<Acc*>(params.log_weight) + index;
  SetFarBias(state.anchor, query_head.feature_bias, strides, s.queries.far_bias);
  head.ForQueries(block, s.queries.chunk, [&](const QueryRows& rows) {
    const Left<Acc> q =
        LoadLeft<Acc, Acc>(head.QueryTensor(i), rows.row, rows.n, strides.d_pad, s.queries.q,
                           static_cast<Acc*>(nullptr), &head.prefetcher);
    head.prefetcher.Request(out, rows.row, rows.n);
    ComputeLogits(context, rows, q, query_head.projection, s.queries, &head.prefetcher);
    NearFarWeights(context, rows, state.mass, s);
    for (int64_t r = 0; r < rows.n; ++r) {
      const Acc den = s.den[r];
      log_weight[(rows.row + r) * dims.heads] =
          den == 0 ? -kInf<Acc> : kLn2<Acc> * (s.shift[r] + Log2(den));
      s.den[r] = Inverse(den);
    }
    Spans<Acc> spans;
    if (context.has_far) spans.Add(s.queries.near_columns, state.sum, strides.m, false);
    for (int b = 0; b < context.near.count; ++b)
      spans.Add(context.near.column[b], context.near.block[b]->keys.v, context.Whole(b, rows),
                context.IsTriangle(b));
    if (in_place) {
      SpanProduct(s.queries.logits, s.queries.stride, spans, s.den, out.At<Acc>(rows.row),
                  out.heads * out.width, rows.n, strides.e_pad);
    } else {
      SpanProduct(s.queries.logits, s.queries.stride, spans, s.den, s.out, strides.e_pad, rows.n,
                  strides.e_pad);
      StoreRows(out, rows.row, rows.n, s.out, strides.e_pad);
    }
  });
}

// The queries of a block, of all heads of the group.
template <class Acc>
void NearFarBlock(NearFarHead<Acc, NearFarParams>& head, int64_t block,
                  const SummaryPartial<Acc>& state, NearFarScratch<Acc>& s) {
  const NearKeys<Acc> near = head.Near(block);
  const NearFarContext<Acc> context = head.Context(near, state);
  s.queries.SetNearBias(near);
  for (int64_t i = 0; i < GroupSize(head.dims); ++i)
    NearFarQueries(head, block, context, state, i, s);
}

// Writes the final state: the initial one with the keys that are summed up in `own`.
template <class Acc>
void FinishNearFar(const NearFarHead<Acc, NearFarParams>& head, const SummaryPartial<Acc>& own) {
  const NearFarParams& params = head.params;
  const int64_t at = (head.range.sequence * params.dims.groups + head.range.head) * head.strides.m;
  Acc *log_mass = static_cast<Acc*>(params.state.log_mass) + at,
      *mean = static_cast<Acc*>(params.state.mean) + at * head.strides.e;
  if (head.causal() && head.blocks.FinalBlocks() == 0)
    return CopyGivenState(head.strides, head.Initial(), log_mass, mean);
  WriteNextState(head.strides, head.Initial(), own.anchor, own.mass, own.sum, log_mass, mean);
}

template <class Acc>
bool CausalNearFar(NearFarHead<Acc, NearFarParams>& head) {
  const Blocks& blocks = head.blocks;
  Arena arena;
  NearFarScratch<Acc> s;
  RunningState<Acc> state;
  if (!arena.Allocate([&] {
        head.SetPointers(arena, false);
        s.SetPointers(arena, head.strides, blocks, head.NearBlocks());
        state.SetPointers(arena, head.strides);
      }))
    return false;
  state.Start(head.Initial(), head.strides);
  const auto own = state.Own(head.strides);
  for (int64_t block = 0; block < blocks.count(); ++block) {
    if (block >= 2) {
      head.Summarize(block - 2, false, own);
      state.Update(head.strides);
    }
    head.LoadBlock(block);
    if (blocks.FirstQuery(block) < blocks.End(block))
      NearFarBlock(head, block, state.All(head.strides), s);
  }
  if (blocks.FinalBlocks() == blocks.count() - 1 && blocks.count() > 1)
    head.Summarize(blocks.count() - 2, false, own);
  FinishNearFar(head, own);
  return true;
}

template <class Acc>
bool BidirectionalNearFar(NearFarHead<Acc, NearFarParams>& head) {
  const Blocks& blocks = head.blocks;
  Arena arena;
  NearFarScratch<Acc> s;
  FarStates<Acc> states(head.strides, blocks.count(), false);
  Acc* slots;
  if (!arena.Allocate([&] {
        head.SetPointers(arena, false);
        s.SetPointers(arena, head.strides, blocks, head.NearBlocks());
        states.SetPointers(arena);
        slots = arena.Take<Acc>((blocks.count() + 2) * SummaryPartial<Acc>::Size(head.strides));
      }))
    return false;
  states.Start(slots);
  LoadState(head.Initial(), head.strides, states.Base());
  SummarizeBlocks(head, states);
  for (int64_t block = 0; block < blocks.count(); ++block) {
    head.LoadNear(block);
    NearFarBlock(head, block, states.At(block), s);
  }
  FinishNearFar(head, states.Given());
  return true;
}

// A whole sequence and key/value head.
template <class Acc>
bool NearFar(const NearFarParams& params, const Acc* query_projection, const Acc* key_projection,
             WorkRange range) {
  NearFarHead<Acc, NearFarParams> head(params, query_projection, key_projection, range);
  return params.attributes.causal ? CausalNearFar(head) : BidirectionalNearFar(head);
}

PERFORMER_ISA_END
