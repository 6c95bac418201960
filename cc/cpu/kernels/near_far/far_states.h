// States of far keys. If causal, one running state grows by a block at a time. Otherwise every block
// of queries has a state of its own, of the keys before and after its near blocks: FarStates.
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

template <class Acc>
void LoadState(const LoadedState<Acc>& state, const Strides& strides,
               const SummaryPartial<Acc>& to) {
  ClearState(strides, to);
  state.CopyMean(strides, to.sum);
  for (int64_t m = 0; m < strides.m; ++m) {
    to.anchor[m] = state.log_mass[m] * kLog2e<Acc>;
    to.mass[m] = to.anchor[m] == -kInf<Acc> ? 0 : 1;
  }
}

template <class Acc>
bool IsEmpty(const Strides& strides, const SummaryPartial<Acc>& state) {
  for (int64_t m = 0; m < strides.m; ++m)
    if (state.anchor[m] != -kInf<Acc>) return false;
  return true;
}

// Adds blocks of keys to states.
template <class Acc>
struct BlockSummarizer {
  Acc *p, *column_max;  // [rows][m_stride], [m_pad]
  int64_t rows;         // keys that are added at a time

  void SetPointers(Arena& arena, const Strides& strides, int64_t max_rows) {
    rows = max_rows < kNearFarChunk ? max_rows : kNearFarChunk;
    p = arena.Take<Acc>(rows * strides.m_stride);
    column_max = arena.Take<Acc>(strides.m_pad);
  }
  void Add(const Map<Acc>& map, const KeyChunk<Acc>& keys, int64_t count,
           const ProjectionOperands<Acc, Acc>& projection, const Strides& strides,
           Prefetcher* prefetcher, const SummaryPartial<Acc>& to) {
    if (!keys.any) return;
    for (int64_t j = 0; j < count; j += rows)
      AddToSummary<Acc, Acc>(map, {keys.k + j * strides.d_pad, strides.d_pad, 1},
                             {keys.v + j * strides.e_pad, strides.e_pad}, keys.offset + j,
                             count - j < rows ? count - j : rows, projection, strides, false, p,
                             nullptr, column_max, prefetcher, to);
  }
};

// States of `count` blocks, of which At(c) merges those that lie two blocks or more from block c,
// and a base, in memory of this class. Suffixes are kept for kGroup blocks at a time.
template <class Acc>
class FarStates {
 public:
  static constexpr int64_t kGroup = 8;

  FarStates(const Strides& strides, int64_t count) : strides_(strides), count_(count) {}

  void SetPointers(Arena& arena) {
    const int64_t size = SummaryPartial<Acc>::Size(strides_);
    blocks_ = arena.Take<Acc>((count_ + 2) * size);
    ends_ = arena.Take<Acc>(CeilDiv(count_, kGroup) * size);
    suffixes_ = arena.Take<Acc>((kGroup + 1) * size);
    before_ = arena.Take<Acc>(size);
    merged_ = arena.Take<Acc>(size);
  }
  // The state of one block, empty at first. Once At(c) has returned, Spare(c) is memory for another
  // state of block c, which outlives all calls of At.
  SummaryPartial<Acc> Block(int64_t block) const { return Slot(blocks_, first_ + block); }
  SummaryPartial<Acc> Spare(int64_t block) const { return Slot(blocks_, block); }
  // The states of Spare become those of the blocks, for another pass of Start and At.
  void UseSpares() { first_ = 0; }
  // The state that all blocks share; to be set before Start.
  SummaryPartial<Acc> Base() const { return Slot(before_, 0); }

  // To be called when the states of all blocks are there.
  void Start() {
    const auto running = Slot(merged_, 0);
    ClearState(strides_, running);
    int64_t block = count_;
    for (int64_t group = CeilDiv(count_, kGroup) - 1; group >= 0; --group) {
      for (const int64_t end = (group + 1) * kGroup + 2; block > end;)
        MergeSummaries(strides_, running, Block(--block));
      CopyState(strides_, running, Slot(ends_, group));
    }
  }
  // To be called for c = 0, 1, ... in this order; valid until the next call.
  SummaryPartial<Acc> At(int64_t c) {
    if (c % kGroup == 0) StartGroup(c);
    if (c >= 2) MergeSummaries(strides_, Base(), Block(c - 2));
    const auto merged = Slot(merged_, 0);
    CopyState(strides_, Base(), merged);
    MergeSummaries(strides_, merged, Slot(suffixes_, c % kGroup));
    return merged;
  }
  // Of the base and all blocks, after the last At.
  SummaryPartial<Acc> All() const {
    for (int64_t c = count_ > 2 ? count_ - 2 : 0; c < count_; ++c)
      MergeSummaries(strides_, Base(), Block(c));
    return Base();
  }

 private:
  SummaryPartial<Acc> Slot(Acc* base, int64_t i) const {
    return SummaryPartial<Acc>::At(base + i * SummaryPartial<Acc>::Size(strides_), strides_);
  }
  // suffixes[i]: of the blocks from c + i + 2 on.
  void StartGroup(int64_t c) {
    CopyState(strides_, Slot(ends_, c / kGroup), Slot(suffixes_, kGroup));
    for (int64_t i = kGroup - 1; i >= 0; --i) {
      CopyState(strides_, Slot(suffixes_, i + 1), Slot(suffixes_, i));
      if (c + i + 2 < count_) MergeSummaries(strides_, Slot(suffixes_, i), Block(c + i + 2));
    }
  }

  const Strides strides_;
  const int64_t count_;
  int64_t first_ = 2;  // where the state of block 0 lies in blocks_
  Acc *blocks_ = nullptr, *ends_ = nullptr, *suffixes_ = nullptr;  // states
  Acc *before_ = nullptr, *merged_ = nullptr;
};

PERFORMER_ISA_END
