// States of far keys. If causal, one running state grows by a block at a time: RunningState.
// Otherwise every block of queries has a state of its own, of the keys before and after its near
// blocks: FarStates.
#pragma once
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
  Acc *p, *column_max;  // [rows][m_stride], [m_pad]
  int64_t rows;         // keys that are added at a time

  void SetPointers(Arena& arena, const Strides& strides, int64_t max_rows) {
    rows = max_rows < kNearFarChunk ? max_rows : kNearFarChunk;
    p = arena.Take<Acc>(rows * strides.m_stride);
    column_max = arena.Take<Acc>(strides.m_pad);
  }
  // Adds `count` keys to a state; sets it to that of the keys if `first`.
  void Add(const Map<Acc>& map, const KeyChunk<Acc>& keys, int64_t count,
           const ProjectionOperands<Acc, Acc>& projection, const Strides& strides, bool first,
           Prefetcher* prefetcher, const SummaryPartial<Acc>& to) {
    if (!keys.any) {
      if (first) ClearState(strides, to);
      return;
    }
    for (int64_t m = 0; first && m < strides.m_pad; ++m) to.anchor[m] = -kInf<Acc>, to.mass[m] = 0;
    for (int64_t j = 0; j < count; j += rows, first = false)
      AddToSummary<Acc, Acc>(map, {keys.k + j * strides.d_pad, strides.d_pad, 1},
                             {keys.v + j * strides.e_pad, strides.e_pad}, keys.offset + j,
                             count - j < rows ? count - j : rows, projection, strides, first, p,
                             nullptr, column_max, prefetcher, to);
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
    if (has_initial_)
      MergedSummary(strides, At(initial_, strides), Own(strides), At(all_, strides));
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

// States of `count` blocks, of which At(c) merges those that lie two blocks or more from block c,
// and a base. First the blocks are given from the last to the first, then At is called from the
// first to the last; the other way round if `reversed`. Suffixes of the blocks after c are kept for
// kGroup blocks at a time: the memory is little more than that of the blocks.
template <class Acc>
class FarStates {
 public:
  static constexpr int64_t kGroup = 4;

  // The states of the blocks lie in slots [count + 2][SummaryPartial::Size], from slot 2 on; if
  // `reversed` from slot 0 on. So, as At(c) is the last to need the slot c, reversed states may take
  // the place of those that they are made from.
  FarStates(const Strides& strides, int64_t count, bool reversed)
      : strides_(strides), count_(count), reversed_(reversed) {}

  void SetPointers(Arena& arena) {
    const int64_t size = SummaryPartial<Acc>::Size(strides_);
    ends_ = arena.Take<Acc>(CeilDiv(count_, kGroup) * size);
    suffixes_ = arena.Take<Acc>((kGroup + 1) * size);
    for (Acc** state : {&given_, &base_, &merged_}) *state = arena.Take<Acc>(size);
  }
  void Start(Acc* slots) {
    slots_ = slots;
    ClearState(strides_, Slot(given_, 0));
  }
  SummaryPartial<Acc> Block(int64_t block) const {
    return Slot(slots_, reversed_ ? block : block + 2);
  }
  // The state that all blocks share, to be set before At is called.
  SummaryPartial<Acc> Base() const { return Slot(base_, 0); }

  // To be called when the state of a block is there.
  void Give(int64_t block) {
    const int64_t i = Order(block);
    MergeSummaries(strides_, Slot(given_, 0), Block(block));
    if (i >= kGroup + 2 && i % kGroup == 2)
      CopyState(strides_, Slot(given_, 0), Slot(ends_, i / kGroup - 1));
  }
  // Of all blocks that were given, without the base.
  SummaryPartial<Acc> Given() const { return Slot(given_, 0); }
  // Valid until the next call.
  SummaryPartial<Acc> At(int64_t block) {
    const int64_t i = Order(block);
    if (i % kGroup == 0) StartGroup(i);
    if (i >= 2) MergeSummaries(strides_, Base(), InOrder(i - 2));
    const auto merged = Slot(merged_, 0);
    MergedSummary(strides_, Base(), Slot(suffixes_, i % kGroup), merged);
    return merged;
  }
  // Of the base and all blocks, after the last At.
  SummaryPartial<Acc> All() const {
    for (int64_t i = count_ > 2 ? count_ - 2 : 0; i < count_; ++i)
      MergeSummaries(strides_, Base(), InOrder(i));
    return Base();
  }

 private:
  int64_t Order(int64_t block) const { return reversed_ ? count_ - 1 - block : block; }
  SummaryPartial<Acc> InOrder(int64_t i) const { return Block(Order(i)); }
  SummaryPartial<Acc> Slot(Acc* base, int64_t i) const {
    return SummaryPartial<Acc>::At(base + i * SummaryPartial<Acc>::Size(strides_), strides_);
  }
  // suffixes[j]: of the blocks from i + j + 2 on.
  void StartGroup(int64_t i) {
    if (i + kGroup + 2 < count_) {
      CopyState(strides_, Slot(ends_, i / kGroup), Slot(suffixes_, kGroup));
    } else {
      ClearState(strides_, Slot(suffixes_, kGroup));
    }
    for (int64_t j = kGroup - 1; j >= 0; --j) {
      if (i + j + 2 < count_) {
        MergedSummary(strides_, Slot(suffixes_, j + 1), InOrder(i + j + 2), Slot(suffixes_, j));
      } else {
        ClearState(strides_, Slot(suffixes_, j));
      }
    }
  }

  const Strides strides_;
  const int64_t count_;
  const bool reversed_;
  Acc* slots_ = nullptr;                       // [count + 2] states
  Acc *ends_ = nullptr, *suffixes_ = nullptr;  // of whole groups, of one group
  Acc *given_ = nullptr, *base_ = nullptr, *merged_ = nullptr;
};

PERFORMER_ISA_END
