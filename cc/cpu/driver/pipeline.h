// Causal attention for fewer sequences and heads than threads. Only the keys of a sequence depend
// on one another: each chain of keys runs one window of sub-chunks ahead, while all threads share
// the queries of the window before.
//   stage 0: keys of window 0      stage 1: keys of window 1, queries of window 0      ...
// The bits are those of Kernels::causal, as the same functions work on the same numbers. Memory is
// two windows for each chain, whatever its length.
#pragma once
#include <algorithm>
#include <atomic>

#include "cpu/driver/work_division.h"
#include "cpu/kernels/kernels.h"

namespace performer {
namespace cpu {

// The size of all windows together, which should stay in the last cache on the way from thread to
// thread. As the work on a sub-chunk grows with its size, this also fixes the work of a stage,
// after which the threads wait for one another.
inline constexpr int64_t kPipelineBytes = 8 << 20;

template <class Acc>
class CausalPipeline {
 public:
  // Whether threads would idle otherwise, and a sequence is long enough to fill the windows.
  static bool IsWorthSplitting(const WorkList& list, const Strides& strides,
                               const Threads& threads) {
    const int64_t chunks = LongestChunks(list);
    return list.count < threads.count && chunks >= Slots(strides, 1) &&
           chunks * kCausalChunk > kMaxStreamRows;
  }

  CausalPipeline(const CausalParams& params, const Kernels<Acc>& kernels,
                 const Acc* query_projection, const Acc* key_projection)
      : params_(params),
        kernels_(kernels),
        query_projection_(query_projection),
        key_projection_(key_projection),
        strides_(MakeStrides<Acc>(params.dims)) {}

  // cost_per_row: nanoseconds for the key and the queries of one row.
  Status Run(const WorkList& list, const Threads& threads, int64_t cost_per_row) {
    PERFORMER_RETURN_IF_ERROR(Start(list));
    // The first windows are short: before one is complete, only the chains have work.
    int64_t slots = slots_ / 8 + 1;
    for (int stage = 0; HasWork(); stage = 1 - stage, slots = std::min(2 * slots, slots_)) {
      for (int64_t c = 0; c < count_; ++c) Window(c, stage).slots = slots;
      // An item is whatever one thread gets done: the chains take far longer than other work, so
      // that no even division is known beforehand.
      const int64_t cost = count_ * slots * kCausalChunk * cost_per_row / threads.count + 1;
      next_chain_ = 0;
      threads.parallel_for(threads.count, cost, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) Work(stage);
      });
      if (!ok_) return NoScratch();
      for (int64_t c = 0; c < count_; ++c) Clear(Window(c, 1 - stage));
    }
    return Status();
  }

 private:
  static int64_t LongestChunks(const WorkList& list) {
    int64_t rows = 0;
    for (int64_t i = 0; i < list.count; ++i)
      rows = std::max(rows, list.ranges[i].end - list.ranges[i].begin);
    return rows / kCausalChunk;
  }
  // Sub-chunks of a window.
  static int64_t Slots(const Strides& strides, int64_t chains) {
    const int64_t size = CausalWindow<Acc>::SlotSize(strides) * static_cast<int64_t>(sizeof(Acc));
    return std::max<int64_t>(kPipelineBytes / (2 * chains * size), 1);
  }
  static void Clear(CausalWindow<Acc>& window) { window.count = window.taken = 0; }
  CausalWindow<Acc>& Window(int64_t chain, int which) const { return windows_[2 * chain + which]; }

  Status Start(const WorkList& list) {
    count_ = list.count;
    const int64_t slot = CausalWindow<Acc>::SlotSize(strides_),
                  state = SummaryPartial<Acc>::Size(strides_);
    slots_ = Slots(strides_, count_);
    PERFORMER_RETURN_IF_ERROR(Allocate(count_, "chains of keys", &chains_));
    PERFORMER_RETURN_IF_ERROR(Allocate(2 * count_, "windows", &windows_));
    PERFORMER_RETURN_IF_ERROR(Allocate(2 * count_ * slots_, "sub-chunks", &sub_chunks_));
    PERFORMER_RETURN_IF_ERROR(Allocate(count_ * state, "states of causal attention", &states_));
    PERFORMER_RETURN_IF_ERROR(Allocate(2 * count_ * slots_ * slot, "key features", &memory_));
    for (int64_t c = 0; c < count_; ++c) {
      const WorkRange& range = list.ranges[c];
      chains_[c] = {range, range.begin, false,
                    SummaryPartial<Acc>::At(states_.get() + c * state, strides_)};
    }
    for (int64_t i = 0; i < 2 * count_; ++i)
      windows_[i] = {sub_chunks_.get() + i * slots_, memory_.get() + i * slots_ * slot, slots_, 0,
                     0};
    return Status();
  }

  bool HasWork() const {
    for (int64_t c = 0; c < count_; ++c)
      if (!chains_[c].done || Window(c, 0).count > 0 || Window(c, 1).count > 0) return true;
    return false;
  }

  // One thread's share of a stage: chains first, as the next stage waits for them.
  void Work(int stage) {
    for (int64_t c = next_chain_++; c < count_; c = next_chain_++)
      if (!chains_[c].done &&
          !kernels_.causal_keys(params_, key_projection_, &chains_[c], &Window(c, stage)))
        ok_ = false;
    for (int64_t c = 0; c < count_; ++c) {
      CausalWindow<Acc>& window = Window(c, 1 - stage);
      if (window.count > 0 &&
          !kernels_.causal_queries(params_, query_projection_, chains_[c].range.head, &window))
        ok_ = false;
    }
  }

  const CausalParams& params_;
  const Kernels<Acc>& kernels_;
  const Acc *query_projection_, *key_projection_;  // [projection_heads][PackedProjection::Size]
  const Strides strides_;
  int64_t count_ = 0, slots_ = 0;           // chains, sub-chunks of a window
  Buffer<CausalChain<Acc>> chains_;         // [count]
  Buffer<CausalWindow<Acc>> windows_;       // [count][2]
  Buffer<CausalSubChunk<Acc>> sub_chunks_;  // [count][2][slots]
  Buffer<Acc> states_;                      // [count][SummaryPartial::Size]
  Buffer<Acc> memory_;                      // [count][2][slots][CausalWindow::SlotSize]
  std::atomic<int64_t> next_chain_{0};
  std::atomic<bool> ok_{true};
};

}  // namespace cpu
}  // namespace performer
