// Gradient of near-and-far attention. All terms of a row are those of one softmax, near keys and
// features, so that one delta serves both; weights are normalised by lse = log_weight in base 2.
// With y = dout and the state (sum, mass, anchor) of the far keys of a block of queries:
//   near:  P = 2^(s - lse)     ds = P (y v^T - delta)
//   far:   f = 2^(a - lse)     da = f (y sum^T - delta mass)
//   delta = sum_j P (y v^T) + sum_m f (y sum^T) - dlog_weight
//   dq = scale ds k + da w - scale q sum_m da      dw += da^T q      dfeature_bias += da
//   dk += scale ds^T q      dv += P^T y      dkey_bias += ds
// The far parts of keys come from reverse states (reverse_states.h), R and r, of the queries that
// see them:
//   p = 2^(b - reference)      db = p (v R^T - r)      dv += p R
//   dk += db w - scale k sum_m db      dw += db^T k      dkey_bias += sum_m db
// If causal, a forward scan takes the queries, and keeps delta of each row and the anchors of each
// block; a reverse scan takes the keys, and computes f again. Otherwise each block of queries leaves
// its reverse state, and these are merged as the states of keys were.
//
// Values are taken less a centre (state.h), so that what they have in common does not drown the
// differences y v^T - delta in rounding errors. It is that of the initial state or, where that is
// empty, of the first block with an unmasked key; of the last one unless causal. If causal, the
// queries of that block have a centre of 0, as it must not come from later keys.
#pragma once
#include "cpu/kernels/near_far_backward/query_gradients.h"

PERFORMER_ISA_BEGIN

// Keys of a block: the gradients from near queries, and those from far ones and the final state
// where `reverse` is not nullptr.
template <class Acc>
void KeyGradientsOfBlock(NearFarGradient<Acc>& gradient, int64_t block,
                         const SummaryPartial<Acc>* reverse) {
  auto& s = gradient;
  const auto& map = gradient.map;
  const Strides& strides = gradient.strides;
  const int64_t d_pad = strides.d_pad, e_pad = strides.e_pad;
  if (reverse && IsEmpty(strides, *reverse)) reverse = nullptr;
  if (reverse) {
    for (int64_t m = 0; m < strides.m_pad; ++m) s.reference[m] = -reverse->anchor[m];
    TransposeToPanels(reverse->sum, strides.m, e_pad, e_pad, s.sum_panels);
  }
  const int64_t end = gradient.blocks.End(block);
  for (int64_t row = gradient.blocks.Begin(block); row < end; row += s.key_chunk) {
    const int64_t n = end - row < s.key_chunk ? end - row : s.key_chunk;
    const int64_t first = row - gradient.range.begin;
    s.keys.Load(gradient.params, gradient.params.keys, map, strides, gradient.range, row, n,
                &gradient.prefetcher);
    SubtractCentre(strides, n, s.centre, s.keys.v);
    Acc *dk = s.near_dk + first * d_pad, *dv = s.near_dv + first * e_pad;
    for (int64_t j = 0; j < n; ++j) s.row_sum[j] = 0;
    if (reverse && s.keys.any) {
      MatMulPanels(s.keys.k, d_pad, n, gradient.key_projection.panels, strides.d, strides, s.p,
                   &gradient.prefetcher);
      KeyFeatures<Acc>(n, strides, s.keys.offset, s.reference, s.p, nullptr);
      MatMulPanels(s.keys.v, e_pad, n, s.sum_panels, e_pad, strides, s.db, &gradient.prefetcher);
      KeyLogitGradient(n, strides, s.keys.skip, reverse->mass, s.p, s.db, s.row_sum);
      MatMul<true>(s.p, strides.m_stride, 1, reverse->sum, e_pad, strides.m, dv, e_pad, n, e_pad);
      MatMul<true>(s.db, strides.m_stride, 1, gradient.key_projection.rows.data, d_pad, strides.m,
                   dk, d_pad, n, d_pad);
      if (gradient.params.attributes.projection_gradient)
        MatMul<true>(s.db, 1, strides.m_stride, s.keys.k, d_pad, n, gradient.partial.key_projection,
                     d_pad, strides.m, d_pad);
    }
    StoreKeyGradients(gradient.key_rows, map, strides, s.keys, s.row_sum, row, n, dk, dv);
    for (int64_t j = 0; j < n; ++j)
      if (!s.keys.skip[j]) gradient.key_rows.bias[row + j] += s.near_dbias[first + j];
  }
}

template <class Acc>
bool HasSeenKeys(const Strides& strides, const Acc* anchor) {
  for (int64_t m = 0; m < strides.m; ++m)
    if (anchor[m] != -kInf<Acc>) return true;
  return false;
}

// Adds the queries of a block to a reverse state, whose references are at most `anchor`, that of the
// state that they read.
template <class Acc>
void AddQueriesToReverseState(NearFarGradient<Acc>& gradient, int64_t block, const Acc* anchor,
                              const SummaryPartial<Acc>& reverse) {
  QueryLogits<Acc>& s = gradient.queries;
  const NearKeys<Acc> none = {};
  const NearFarContext<Acc> context = {
      gradient.map, gradient.strides, none, true, gradient.params.attributes.query_norm, true};
  for (int64_t i = 0; i < GroupSize(gradient.dims); ++i) {
    const QueryHead<Acc> head = gradient.Head(i);
    SetFarBias(anchor, head.feature_bias, gradient.strides, s.far_bias);
    gradient.ForQueries(block, s.chunk, [&](const QueryRows& rows) {
      gradient.LoadQueries(rows, i);
      ComputeLogits(context, rows, {s.q, gradient.strides.d_pad, 1}, head.projection, s,
                    &gradient.prefetcher);
      for (int64_t r = 0; r < rows.n; ++r) NormalisedWeights(gradient, context, rows, r);
      AddToReverseState(gradient, rows, gradient.Delta(i, rows), reverse);
    });
  }
}

// The same, where the references are those of later queries so far.
template <class Acc>
void LowerReferencesAndAddQueries(NearFarGradient<Acc>& gradient, int64_t block, const Acc* anchor,
                                  const SummaryPartial<Acc>& reverse) {
  const Strides& strides = gradient.strides;
  if (!HasSeenKeys(strides, anchor)) return;
  MirrorAnchors(strides, anchor, gradient.mirrored);
  for (int64_t m = 0; m < strides.m_pad; ++m)  // the padding, and features that nobody saw before
    gradient.mirrored[m] = Max(gradient.mirrored[m], reverse.anchor[m]);
  RaiseAnchors(strides, gradient.mirrored, false, reverse);
  AddQueriesToReverseState(gradient, block, anchor, reverse);
}

template <class Acc>
bool CausalNearFarGrad(NearFarGradient<Acc>& gradient) {
  const Strides& strides = gradient.strides;
  const Blocks& blocks = gradient.blocks;
  const int64_t count = blocks.count();
  Arena arena;
  Acc *forward_memory, *reverse_memory, *anchors;  // anchors [count][m_pad]
  if (!arena.Allocate([&] {
        gradient.SetPointers(arena);
        for (Acc** memory : {&forward_memory, &reverse_memory})
          *memory = arena.Take<Acc>(SummaryPartial<Acc>::Size(strides));
        anchors = arena.Take<Acc>(count * strides.m_pad);
      }))
    return false;
  const auto state = SummaryPartial<Acc>::At(forward_memory, strides);
  gradient.Start(state);
  for (int64_t block = 0; block < count; ++block) {
    if (block >= 1) gradient.CentreOn(block - 1);
    if (block >= 2) gradient.Summarize(block - 2, false, state);
    for (int64_t m = 0; m < strides.m_pad; ++m)
      anchors[block * strides.m_pad + m] = state.anchor[m];
    gradient.LoadBlock(block);
    if (blocks.FirstQuery(block) < blocks.End(block))
      QueryGradients<Acc>(gradient, block, state, nullptr);
  }
  if (blocks.FinalBlocks() == count - 1 && count > 1) gradient.Summarize(count - 2, false, state);

  gradient.prefetcher = Prefetcher(true);
  const auto reverse = SummaryPartial<Acc>::At(reverse_memory, strides);
  StartReverseState(gradient, state, reverse);
  // Block -1 and block -2 stand for the initial state, which the first two blocks read too.
  for (int64_t block = count - 1; block >= -2; --block) {
    if (block + 2 < count)
      LowerReferencesAndAddQueries(gradient, block + 2, anchors + (block + 2) * strides.m_pad,
                                   reverse);
    if (block >= 0)
      KeyGradientsOfBlock(gradient, block, block < blocks.FinalBlocks() ? &reverse : nullptr);
  }
  StoreInitialGradient(gradient, reverse);
  return true;
}

template <class Acc>
bool BidirectionalNearFarGrad(NearFarGradient<Acc>& gradient, const Sharing& sharing) {
  const Strides& strides = gradient.strides;
  const int64_t count = gradient.blocks.count(), size = SummaryPartial<Acc>::Size(strides);
  Acc *slots, *memory, *anchors;  // [plan.Slots()] states, a state, [count][m_pad]
  const auto set_pointers = [&](Arena& arena) {
    gradient.SetPointers(arena);
    memory = arena.Take<Acc>(size);
    anchors = arena.Take<Acc>(count * strides.m_pad);
  };
  Arena measure, arena;
  set_pointers(measure);
  const FarPlan plan = PlanFarStates(
      count, true, false,
      (sharing.workspace - measure.used()) / (size * static_cast<int64_t>(sizeof(Acc))));
  FarStates<Acc> states(strides, plan, false), reverse_states(strides, plan, true);
  if (!arena.Allocate([&] {
        set_pointers(arena);
        states.SetPointers(arena);
        reverse_states.SetPointers(arena);
        slots = arena.Take<Acc>(plan.Slots() * size);
      }))
    return false;
  states.Start(slots);
  gradient.Start(states.Base());
  gradient.FindCentre();
  states.SetBase();
  const auto make = [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block)
      gradient.Summarize(block, true, states.Block(block));
  };
  states.MakeAll(make);
  reverse_states.Start(slots);
  const auto clear_reverse = [&](int64_t block, const Acc* anchor) {
    const auto reverse = reverse_states.Block(block);
    ClearState(strides, reverse);
    MirrorAnchors(strides, anchor, reverse.anchor);
    return reverse;
  };
  for (int64_t block = 0; block < count; ++block) {
    if (block % plan.step == 0) states.Enter(block, false, make);
    const auto state = states.Far(block, memory);
    Acc* anchor = anchors + block * strides.m_pad;
    for (int64_t m = 0; m < strides.m_pad; ++m) anchor[m] = state.anchor[m];
    const auto reverse = clear_reverse(block, anchor);
    QueryGradients(gradient, block, state, &reverse);
    reverse_states.Give(count - 1 - block);
  }
  StartReverseState(gradient, states.All(memory), reverse_states.Base());
  reverse_states.SetBase();
  gradient.prefetcher = Prefetcher(true);
  const auto make_reverse = [&](int64_t first, int64_t last) {
    for (int64_t block = count - 1 - first; block > count - 1 - last; --block) {
      const Acc* anchor = anchors + block * strides.m_pad;
      const auto reverse = clear_reverse(block, anchor);
      if (HasSeenKeys(strides, anchor)) AddQueriesToReverseState(gradient, block, anchor, reverse);
    }
  };
  for (int64_t i = 0; i < count; ++i) {
    if (i % plan.step == 0) reverse_states.Enter(i, true, make_reverse);
    const auto reverse = reverse_states.Far(count - 1 - i, memory);
    KeyGradientsOfBlock(gradient, count - 1 - i, &reverse);
  }
  StoreInitialGradient(gradient, reverse_states.All(memory));
  return true;
}

// A whole sequence and key/value head, as CausalGrad.
template <class Acc>
bool NearFarGrad(const NearFarGradParams& params, const Acc* query_projection,
                 const Acc* key_projection, WorkRange range, const Sharing& sharing, Acc* key_bias,
                 CausalGradPartial<Acc> partial) {
  NearFarGradient<Acc> gradient(params, query_projection, key_projection, range, key_bias, partial);
  return params.attributes.causal ? CausalNearFarGrad(gradient)
                                  : BidirectionalNearFarGrad(gradient, sharing);
}

PERFORMER_ISA_END
