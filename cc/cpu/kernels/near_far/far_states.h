// States of far keys. If causal, one running state takes in a block at a time: RunningState.
// Otherwise every block has a state of its own, and the queries of a block read the merged states of
// the blocks before and after its near ones: FarStates.
#pragma once
#include "cpu/far_plan.h"
#include "cpu/kernels/near_far/blocks.h"
#include "cpu/kernels/state.h"
#include "cpu/kernels/summarize.h"

PERFORMER_ISA_BEGIN

template <class Acc>
PERFORMER_INLINE void CopyState(const Strides& strides, const SummaryPartial<Acc>& from,
                                const SummaryPartial<Acc>& to) {
  for (int64_t i = 0; i < SummaryPartial<Acc>::Size(strides); i += kLanes<Acc>)
    Store(to.anchor + i, Load(from.anchor + i));
}

// to = the state without keys.
template <class Acc>
void ClearState(const Strides& strides, const SummaryPartial<Acc>& to) {
  for (int64_t i = 0; i < SummaryPartial<Acc>::Size(strides); ++i) to.anchor[i] = 0;
  for (int64_t m = 0; m < strides.m_pad; ++m) to.anchor[m] = -kInf<Acc>;
}

// to = a state as the caller gave it.
template <class Acc>
void LoadState(const LoadedState<Acc>& state, const Strides& strides,
               const SummaryPartial<Acc>& to) {
  ClearState(strides, to);
  state.CopyMean(strides, to.sum);
  for (int64_t m = 0; m < strides.m; ++m) {
    to.anchor[m] = static_cast<Acc>(state.Log2Mass(m));
    to.mass[m] = to.anchor[m] == -kInf<Acc> ? 0 : 1;
  }
}

template <class Acc>
bool IsEmpty(const Strides& strides, const SummaryPartial<Acc>& state) {
  for (int64_t m = 0; m < strides.m; ++m)
    if (state.anchor[m] != -kInf<Acc>) return false;
  return true;
}

// Summarizes blocks of keys.
template <class Acc>
struct BlockSummarizer {
  KeyChunk<Acc> chunk;  // rows of the tensor
  Acc *p, *column_max;  // [rows][m_stride], [m_pad]
  int64_t rows;         // keys that are added at a time

  void SetPointers(Arena& arena, const Strides& strides, int64_t max_rows) {
    rows = max_rows < kNearFarChunk ? max_rows : kNearFarChunk;
    chunk.SetPointers(arena, strides, rows);
    p = arena.Take<Acc>(rows * strides.m_stride);
    column_max = arena.Take<Acc>(strides.m_pad);
  }
  // Adds n keys, which have been loaded, to a state; sets it to that of the keys if `first`.
  // Their rows k are those of the chunk or of the tensor.
  void Add(const Map<Acc>& map, const Left<Acc>& k, const KeyChunk<Acc>& keys, int64_t n,
           const ProjectionOperands<Acc, Acc>& projection, const Strides& strides, bool first,
           Prefetcher* prefetcher, const SummaryPartial<Acc>& to) {
    if (!keys.any) {
      if (first) ClearState(strides, to);
      return;
    }
    for (int64_t m = 0; first && m < strides.m_pad; ++m) to.anchor[m] = -kInf<Acc>, to.mass[m] = 0;
    for (int64_t j = 0; j < n; j += rows, first = false)
      AddToSummary<Acc, Acc>(map, {k.data + j * k.row_stride, k.row_stride, 1},
                             {keys.v + j * strides.e_pad, strides.e_pad}, keys.offset + j,
                             n - j < rows ? n - j : rows, projection, strides, first, p, nullptr,
                             column_max, prefetcher, to);
  }
  // The same for rows [row, end) of the tensor. Values are less `centre` [e_pad], if that is not
  // nullptr.
  void AddRows(const Common& call, const KeySide& side, const Map<Acc>& map, const WorkRange& range,
               int64_t row, int64_t end, const ProjectionOperands<Acc, Acc>& projection,
               const Strides& strides, const Acc* centre, bool first, Prefetcher* prefetcher,
               const SummaryPartial<Acc>& to) {
    for (; row < end; row += rows) {
      const int64_t n = end - row < rows ? end - row : rows;
      chunk.LoadBias(call, side, range, row, n);
      if (!chunk.any) continue;
      const Left<Acc> k = LoadKeys(KeyChunk<Acc>::Keys(call, side, range), row, n, map,
                                   strides.d_pad, &chunk, static_cast<Acc*>(nullptr), prefetcher);
      LoadRows<Acc>(KeyChunk<Acc>::Values(call, side, range), row, n, chunk.skip, chunk.v,
                    strides.e_pad, prefetcher);
      if (centre) SubtractCentre(strides, n, centre, chunk.v);
      Add(map, k, chunk, n, projection, strides, first, prefetcher, to);
      first = false;
    }
    if (first) ClearState(strides, to);
  }
};

// A final state without keys of the call is the initial one, to the bit. Where both have the same
// memory there is nothing to do.
template <class Acc>
void CopyGivenState(const Strides& strides, const LoadedState<Acc>& initial, Acc* log_mass,
                    Acc* mean) {
  if (log_mass != initial.log_mass)
    __builtin_memcpy(log_mass, initial.log_mass, sizeof(Acc) * strides.m);
  if (mean != initial.mean)
    __builtin_memcpy(mean, initial.mean, sizeof(Acc) * strides.m * strides.e);
}

// The initial state and blocks of keys that follow. The sums of these are kept apart, so that the
// final state is the initial one to the bit where they are masked, and rounding errors of very many
// calls do not add up (WriteNextState).
template <class Acc>
class RunningState {
 public:
  void SetPointers(Arena& arena, const Strides& strides) {
    for (Acc** state : {&initial_, &own_, &all_})
      *state = arena.Take<Acc>(SummaryPartial<Acc>::Size(strides));
  }
  void Start(const LoadedState<Acc>& initial, const Strides& strides) {
    LoadState(initial, strides, At(initial_, strides));
    ClearState(strides, At(own_, strides));
    has_initial_ = !IsEmpty(strides, At(initial_, strides));
    if (has_initial_) CopyState(strides, At(initial_, strides), At(all_, strides));
  }
  // Of the keys of this call.
  SummaryPartial<Acc> Own(const Strides& strides) const { return At(own_, strides); }
  // To be called when keys were added to Own.
  void Update(const Strides& strides) const {
    if (!has_initial_) return;
    const SummaryPartial<Acc> both[] = {At(initial_, strides), Own(strides)};
    MergeCounted<2>(strides, both, At(all_, strides));
  }
  SummaryPartial<Acc> All(const Strides& strides) const {
    return At(has_initial_ ? all_ : own_, strides);
  }

 private:
  static SummaryPartial<Acc> At(Acc* base, const Strides& strides) {
    return SummaryPartial<Acc>::At(base, strides);
  }
  Acc *initial_ = nullptr, *own_ = nullptr, *all_ = nullptr;
  bool has_initial_ = false;
};

// The states of the blocks of a sequence, of which Far(c) merges those that lie two blocks or more
// from block c, and a base that all share. Blocks come in groups of kFarGroup.
// Far(c) merges at most six states:
//   prefix  of the blocks before the group, but for the last of them
//   end     of the blocks after the group, but for the first of them
//   those blocks of the group and of its two neighbours that are far from c
//   base
// Groups come in sections (far_plan.h). Only the states of one section lie in memory, in a ring, and
// those of other sections are made again when they are needed. As the state of a block is made from
// nothing, and is merged with the same others in the same order, a section of any length gives the
// same bits.
//
// "In order" is from the first block to the last; the other way round if `reversed`.
template <class Acc>
class FarStates {
 public:
  FarStates(const Strides& strides, const FarPlan& plan, bool reversed)
      : strides_(strides), plan_(plan), reversed_(reversed) {}

  void SetPointers(Arena& arena) {
    const int64_t size = SummaryPartial<Acc>::Size(strides_);
    prefixes_ = arena.Take<Acc>(plan_.Prefixes() * size);
    ends_ = arena.Take<Acc>(plan_.Ends() * size);
    checkpoints_ = arena.Take<Acc>(plan_.Checkpoints() * size);
    base_ = arena.Take<Acc>(size);
  }
  // The blocks lie in `slots` [plan.Slots()][SummaryPartial::Size]. Reversed states may lie in those
  // of the states that they are made from: the state of a block is written plan.kReversedBefore
  // blocks or more after the last use of what lay there.
  void Start(Acc* slots) { slots_ = slots; }
  SummaryPartial<Acc> Block(int64_t block) const {
    return Slot(slots_, (reversed_ ? block : block + plan_.kReversedBefore) % plan_.Slots());
  }
  // The state that all blocks share. SetBase is to be called when it is there.
  SummaryPartial<Acc> Base() const { return Slot(base_, 0); }
  void SetBase() { has_base_ = !IsEmpty(strides_, Base()); }

  // Before all else: make(first, last) makes the states of the blocks [first, last) in
  // order. All are made, from the last to the first.
  template <class Make>
  void MakeAll(Make make) {
    for (int64_t i = RoundUp(plan_.blocks, plan_.step) - plan_.step; i >= 0; i -= plan_.step) {
      const int64_t last = Min(i + plan_.step, plan_.blocks);
      make(i, last);
      for (int64_t j = last - 1; j >= i; --j) Give(j);
    }
  }
  // To be called when the state of block i in order is there, from the last to the first; MakeAll does
  // so itself.
  void Give(int64_t i) {
    if (i % kFarGroup != 1 || i < kFarGroup) return;
    const int64_t group = i / kFarGroup;
    StateList<Acc> list;
    if (HasEnd(group)) list.Add(End(group));
    AddBlocks(i, i + kFarGroup, list);
    Merged(list, End(group - 1), true);
  }
  // To be called for every step in order, with its first block i in order, before Far. Makes the
  // states that lie in no memory; those of the first section only if `again`.
  template <class Make>
  void Enter(int64_t i, bool again, Make make) {
    int64_t group = i / kFarGroup;
    EnterGroup(group);  // needs states that may be replaced
    if (i % plan_.section == 0 && plan_.Checkpoints() > 1 && (i > 0 || again)) MakeSection(i, make);
    const int64_t last = Min(i + plan_.step, plan_.blocks);
    for (++group; group * kFarGroup < last; ++group) EnterGroup(group);
  }
  // The state of the keys that are far from a block of a group that has been entered. It lies in
  // `memory` or elsewhere, and may not be changed.
  SummaryPartial<Acc> Far(int64_t block, Acc* memory) const {
    const int64_t i = Order(block), group = i / kFarGroup;
    StateList<Acc> list;
    if (has_base_) list.Add(Base());
    if (group > 0) list.Add(Prefix(group));
    if (HasEnd(group)) list.Add(End(group));
    AddBlocks(group * kFarGroup - 1, i - 1, list);
    AddBlocks(i + 2, (group + 1) * kFarGroup + 1, list);
    return Merged(list, Slot(memory, 0), false);
  }
  // The state of all blocks, without the base, when all groups have been entered.
  SummaryPartial<Acc> Own(Acc* memory) const {
    const int64_t group = (plan_.blocks - 1) / kFarGroup;
    StateList<Acc> list;
    if (group > 0) list.Add(Prefix(group));
    AddBlocks(group * kFarGroup - 1, plan_.blocks, list);
    return Merged(list, Slot(memory, 0), false);
  }
  // The same with the base.
  SummaryPartial<Acc> All(Acc* memory) const {
    const auto own = Own(memory), all = Slot(memory, 0);
    if (own.sum != all.sum) CopyState(strides_, own, all);
    if (has_base_) MergeSummaries(strides_, all, Base());
    return all;
  }

 private:
  static int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
  // Makes the states of the section that begins with block i in order. Its first block has been made
  // for the section before.
  template <class Make>
  void MakeSection(int64_t i, Make make) {
    for (int64_t j = i + plan_.section - plan_.step; j >= i; j -= plan_.step) {
      const int64_t first = j == 0 ? 0 : j + 1, last = Min(j + plan_.step + 1, plan_.blocks);
      if (first < last) make(first, last);
      for (int64_t k = last - 1; k >= first; --k)
        if (k > i + 1) Give(k);
    }
  }
  // The prefix of a group.
  void EnterGroup(int64_t group) {
    if (group == 0) return;
    StateList<Acc> list;
    if (group > 1) list.Add(Prefix(group - 1));
    AddBlocks((group - 1) * kFarGroup - 1, group * kFarGroup - 1, list);
    Merged(list, Prefix(group), true);
  }
  int64_t Order(int64_t block) const { return reversed_ ? plan_.blocks - 1 - block : block; }
  SummaryPartial<Acc> Slot(Acc* base, int64_t i) const {
    return SummaryPartial<Acc>::At(base + i * SummaryPartial<Acc>::Size(strides_), strides_);
  }
  SummaryPartial<Acc> Prefix(int64_t group) const {
    return Slot(prefixes_, group % plan_.Prefixes());
  }
  // Whether there are blocks behind the one after the group.
  bool HasEnd(int64_t group) const { return (group + 1) * kFarGroup + 1 < plan_.blocks; }
  // That of the last group of a section is kept.
  SummaryPartial<Acc> End(int64_t group) const {
    const int64_t groups = plan_.section / kFarGroup;
    return (group + 1) % groups == 0 ? Slot(checkpoints_, group / groups)
                                     : Slot(ends_, group % groups);
  }
  // Adds the blocks [first, last) in order that there are.
  void AddBlocks(int64_t first, int64_t last, StateList<Acc>& list) const {
    for (int64_t i = first < 0 ? 0 : first; i < last && i < plan_.blocks; ++i)
      list.Add(Block(Order(i)));
  }
  // The merged states, in `memory` unless there is one alone; in any case if `copy`.
  SummaryPartial<Acc> Merged(const StateList<Acc>& list, const SummaryPartial<Acc>& memory,
                             bool copy) const {
    if (list.count == 1 && !copy) return list.state[0];
    if (list.count == 0) ClearState(strides_, memory);
    if (list.count == 1) CopyState(strides_, list.state[0], memory);
    if (list.count >= 2) MergeStates(strides_, list, memory);
    return memory;
  }

  const Strides strides_;
  const FarPlan plan_;
  const bool reversed_;
  bool has_base_ = false;
  Acc* slots_ = nullptr;
  // Of groups, of groups of a section, of the last groups of sections.
  Acc *prefixes_ = nullptr, *ends_ = nullptr, *checkpoints_ = nullptr;
  Acc* base_ = nullptr;
};

PERFORMER_ISA_END
