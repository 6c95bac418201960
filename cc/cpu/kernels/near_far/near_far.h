// Near-and-far attention: near keys exactly, far keys by features, in one softmax.
//   s[i][j] = scale q.k + key_bias     near keys: those of the query's block and its neighbours
//   a[i][m] = w.q + feature_bias - |q|^2 / 2 - log M + anchor[m]    sums of far keys: mass, sum
//   out[i] = (sum_j e^s v + sum_m e^a sum[m]) / (sum_j e^s + sum_m e^a mass[m])
// both relative to one maximum of the row. As the state of far keys has whole blocks, all of them
// before the query if causal, no later key changes a bit of it, and anchors may come from a whole
// block at a time.
//
// All work is on blocks: first their states as keys, which FarStates merges, then their queries.
// Blocks of either kind do not depend on one another, so that threads may share them.
#pragma once
#include "cpu/kernels/near_far/far_states.h"
#include "cpu/kernels/near_far/logits.h"
#include "cpu/kernels/read.h"
#include "cpu/sharing.h"

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
        packed_keys(key_projection),
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
  void LoadBlock(int64_t block) {
    const int64_t row = blocks.Begin(block);
    At(block).Load(params, params.keys, strides, range, row, blocks.End(block) - row, centre,
                   &prefetcher);
    loaded[block % 3] = block;
  }
  // The near keys of a block of queries. Loads those that have not been.
  NearKeys<Acc> Near(int64_t block) {
    NearKeys<Acc> near;
    for (int64_t b = block > 0 ? block - 1 : 0; b <= block + (causal() ? 0 : 1); ++b) {
      if (b == blocks.count()) break;
      if (loaded[b % 3] != b) LoadBlock(b);
      near.Add(At(b));
    }
    return near;
  }
  // Adds the keys of a block to a state; sets it if `first`. Each block that has been loaded may be
  // added once.
  void Summarize(int64_t block, bool first, const SummaryPartial<Acc>& to) {
    KeyBlock<Acc>& near = At(block);
    if (loaded[block % 3] != block)
      return summarizer.AddRows(params, params.keys, map, range, blocks.Begin(block),
                                blocks.End(block), key_projection, strides, centre, first,
                                &prefetcher, to);
    near.keys.FinishOffsets(map, near.rows, [&](int64_t j) {
      return SquaredNorm<Acc>(near.keys.k + j * strides.d_pad, strides.d_pad);
    });
    summarizer.Add(map, {near.keys.k, strides.d_pad, 1}, near.keys, near.rows, key_projection,
                   strides, first, &prefetcher, to);
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
  const Acc *query_projection, *packed_keys;  // [projection_heads][PackedProjection::Size]
  const ProjectionOperands<Acc, Acc> key_projection;
  KeyBlock<Acc> key_blocks[3];       // of block b at b % 3
  int64_t loaded[3] = {-1, -1, -1};  // which they are
  BlockSummarizer<Acc> summarizer;
  const Acc* centre = nullptr;  // [e_pad]: what values are less by, or nullptr
  Prefetcher prefetcher;
};

template <class Acc>
struct NearFarScratch {
  QueryLogits<Acc> queries;
  Acc *shift, *den, *out;  // [chunk], [chunk], [chunk][e_pad]
  Acc* state;              // [SummaryPartial::Size]: of far keys

  void SetPointers(Arena& arena, const Strides& strides, const Blocks& blocks, int near_blocks) {
    queries.SetPointers(arena, strides, blocks, near_blocks);
    shift = arena.Take<Acc>(queries.chunk);
    den = arena.Take<Acc>(queries.chunk);
    out = arena.Take<Acc>(queries.chunk * strides.e_pad);
    state = arena.Take<Acc>(SummaryPartial<Acc>::Size(strides));
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

// One sequence and key/value head, with the memory of one thread.
template <class Acc>
struct NearFarWorker {
  NearFarHead<Acc, NearFarParams> head;
  NearFarScratch<Acc> scratch;

  void SetPointers(Arena& arena) {
    head.SetPointers(arena, false);
    scratch.SetPointers(arena, head.strides, head.blocks, head.NearBlocks());
  }
};

template <class Acc>
class NearFarForward {
 public:
  static constexpr int64_t kSharedBytes = 8 << 20;

  NearFarForward(const NearFarParams& params, const Acc* query_projection,
                 const Acc* key_projection, const WorkRange& range, const Sharing& sharing)
      : worker_{{params, query_projection, key_projection, range}, {}},
        head_(worker_.head),
        sharing_(sharing) {}

  bool Run() {
    Arena worker;
    worker_.SetPointers(worker);
    bytes_ = sharing_.workspace - sharing_.threads * worker.used();
    return head_.causal() ? Causal() : Bidirectional();
  }

 private:
  // The states that fit into so many bytes.
  int64_t StatesOf(int64_t bytes) const {
    return bytes / (SummaryPartial<Acc>::Size(head_.strides) * static_cast<int64_t>(sizeof(Acc)));
  }

  bool Causal() {
    const Strides& strides = head_.strides;
    const int64_t count = head_.blocks.count(), final_blocks = head_.blocks.FinalBlocks();
    const int64_t size = SummaryPartial<Acc>::Size(strides);
    const int64_t most = sharing_.IsShared() ? SharedStep() : 0;
    Arena arena;
    Acc* windows[2] = {};  // [most] states each
    if (!arena.Allocate([&] {
          worker_.SetPointers(arena);
          state_.SetPointers(arena, strides);
          for (Acc** window : {&windows[0], &windows[1]}) *window = arena.Take<Acc>(most * size);
        }))
      return false;
    state_.Start(head_.Initial(), strides);
    if (sharing_.IsShared()) {
      RunInStages(windows, most);
    } else {
      for (int64_t block = 0; block < count; ++block) {
        Advance(block);
        if (HasQueries(block)) NearFarBlock(head_, block, state_.All(strides), worker_.scratch);
      }
    }
    // The last block but one may be far from the next row.
    if (final_blocks == count - 1 && count > 1)
      head_.Summarize(count - 2, false, state_.Own(strides));
    if (!ok_) return false;
    if (final_blocks > 0) {
      Finish(state_.Own(strides));
    } else {
      CopyGivenState(strides, head_.Initial(), LogMass(), Mean());
    }
    return true;
  }
  bool HasQueries(int64_t block) const {
    return head_.blocks.FirstQuery(block) < head_.blocks.End(block);
  }
  // Makes the state that of the far keys of a block, after it was that of the block before.
  void Advance(int64_t block) {
    if (block < 2) return;
    head_.Summarize(block - 2, false, state_.Own(head_.strides));
    state_.Update(head_.strides);
  }
  // Blocks of a stage. The threads hand on their states, which should stay in the cache.
  int64_t SharedStep() const {
    const int64_t fit = StatesOf(bytes_ < kSharedBytes ? bytes_ : kSharedBytes) / 2;
    return fit > sharing_.threads ? fit : sharing_.threads;
  }
  // One thread advances the state through the blocks of a stage, while the others take the queries
  // of the stage before, and then it helps them.
  void RunInStages(Acc* const windows[2], int64_t most) {
    const Strides& strides = head_.strides;
    const int64_t count = head_.blocks.count(), size = SummaryPartial<Acc>::Size(strides);
    // The first stages are short: before one is complete, only one thread has work.
    int64_t step = most / 8 + 1, first = 0, last = 0;  // of queries
    for (int stage = 0; last < count || first < last; stage = 1 - stage) {
      const int64_t next = last + step < count ? last + step : count;
      Acc *reads = windows[1 - stage], *writes = windows[stage];
      int64_t is_taken = 0, taken = first;
      const auto work = [&](int64_t, int64_t) {
        if (__atomic_fetch_add(&is_taken, 1, __ATOMIC_RELAXED) == 0)
          for (int64_t block = last; block < next; ++block) {
            Advance(block);
            CopyState(strides, state_.All(strides),
                      SummaryPartial<Acc>::At(writes + (block - last) * size, strides));
          }
        if (first == last) return;
        WithWorker([&](NearFarWorker<Acc>& worker) {
          for (;;) {
            const int64_t block = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
            if (block >= last) return;
            if (HasQueries(block))
              NearFarBlock(worker.head, block,
                           SummaryPartial<Acc>::At(reads + (block - first) * size, strides),
                           worker.scratch);
          }
        });
      };
      const int64_t rows = (next - last + last - first) * head_.blocks.MaxRows();
      sharing_.ForRanges(sharing_.threads, rows * sharing_.cost_per_row / sharing_.threads + 1,
                         work);
      first = last, last = next;
      step = 2 * step < most ? 2 * step : most;
    }
  }

  bool Bidirectional() {
    const Strides& strides = head_.strides;
    const int64_t count = head_.blocks.count();
    const FarPlan plan = PlanFarStates(count, false, sharing_.IsShared(), StatesOf(bytes_));
    FarStates<Acc> states(strides, plan, false);
    Arena arena;
    Acc* slots;
    if (!arena.Allocate([&] {
          worker_.SetPointers(arena);
          states.SetPointers(arena);
          slots = arena.Take<Acc>(plan.Slots() * SummaryPartial<Acc>::Size(strides));
        }))
      return false;
    states.Start(slots);
    LoadState(head_.Initial(), strides, states.Base());
    states.SetBase();
    const auto make = [&](int64_t first, int64_t last) {
      ForBlocks(first, last, [&](NearFarWorker<Acc>& worker, int64_t block) {
        worker.head.Summarize(block, true, states.Block(block));
      });
    };
    states.MakeAll(make);
    for (int64_t first = 0; first < count; first += plan.step) {
      states.Enter(first, false, make);
      ForBlocks(first, first + plan.step < count ? first + plan.step : count,
                [&](NearFarWorker<Acc>& worker, int64_t block) {
                  NearFarBlock(worker.head, block, states.Far(block, worker.scratch.state),
                               worker.scratch);
                });
    }
    if (ok_) Finish(states.Own(worker_.scratch.state));
    return ok_;
  }

  // body(worker, block) for the blocks [first, last), in any order.
  template <class Body>
  void ForBlocks(int64_t first, int64_t last, Body body) {
    if (!sharing_.IsShared()) {
      for (int64_t block = first; block < last; ++block) body(worker_, block);
      return;
    }
    const int64_t cost = head_.blocks.MaxRows() * sharing_.cost_per_row;
    sharing_.ForRanges(last - first, cost, [&](int64_t begin, int64_t end) {
      WithWorker([&](NearFarWorker<Acc>& worker) {
        for (int64_t i = begin; i < end; ++i) body(worker, first + i);
      });
    });
  }
  // body(worker) with the memory of another thread.
  template <class Body>
  void WithWorker(Body body) {
    NearFarWorker<Acc> worker = {
        {head_.params, head_.query_projection, head_.packed_keys, head_.range}, {}};
    Arena arena;
    if (!arena.Allocate([&] { worker.SetPointers(arena); })) {
      __atomic_store_n(&ok_, false, __ATOMIC_RELAXED);
      return;
    }
    body(worker);
  }

  Acc* LogMass() const { return static_cast<Acc*>(head_.params.state.log_mass) + StateRow(); }
  Acc* Mean() const {
    return static_cast<Acc*>(head_.params.state.mean) + StateRow() * head_.strides.e;
  }
  int64_t StateRow() const {
    return (head_.range.sequence * head_.dims.groups + head_.range.head) * head_.strides.m;
  }
  // Writes the final state: the initial one with the keys that are summed up in `own`.
  void Finish(const SummaryPartial<Acc>& own) const {
    WriteNextState(head_.strides, head_.Initial(), own.anchor, own.mass, own.sum, LogMass(),
                   Mean());
  }

  NearFarWorker<Acc> worker_;
  RunningState<Acc> state_;  // if causal
  NearFarHead<Acc, NearFarParams>& head_;
  const Sharing& sharing_;
  int64_t bytes_ = 0;  // that states may use
  bool ok_ = true;     // false when a thread found no memory
};

// A whole sequence and key/value head.
template <class Acc>
bool NearFar(const NearFarParams& params, const Acc* query_projection, const Acc* key_projection,
             WorkRange range, const Sharing& sharing) {
  return NearFarForward<Acc>(params, query_projection, key_projection, range, sharing).Run();
}

PERFORMER_ISA_END
