// How the drivers divide a call into work items, and run these in parallel.
#pragma once
#include <algorithm>
#include <atomic>

#include "cpu/chunks.h"
#include "cpu/memory/buffer.h"
#include "cpu/memory/layout.h"
#include "cpu/run.h"

namespace performer {
namespace cpu {

// Work items of a call, ordered by sequence, head and row. A pair is a sequence and head that has
// items.
struct WorkList {
  Buffer<WorkRange> ranges;  // [count]
  Buffer<int64_t> ends;      // [pairs]: where the items of each pair end in the list
  int64_t count = 0, pairs = 0;
};

// One item for each sequence, head and block of rows_of(length) rows, where `length` is that of the
// sequence. A sequence without rows has one empty item if `keep_empty`, else none.
template <class RowsOf>
Status Divide(const Common& call, int64_t heads, int64_t rows_per_batch, bool keep_empty,
              RowsOf rows_of, WorkList* list) {
  const int64_t sequences = call.dims.sequences;
  const auto blocks_of = [&](int64_t rows) {
    const int64_t block = rows_of(rows);
    return rows > 0 ? (rows - 1) / block + 1 : int64_t{keep_empty};
  };
  int64_t blocks = 0;  // of all sequences, for one head
  int64_t used = 0;    // sequences that have blocks
  bool overflow = false;
  if (call.offsets == nullptr) {
    const int64_t each = blocks_of(rows_per_batch);
    overflow = __builtin_mul_overflow(sequences, each, &blocks);
    used = each > 0 ? sequences : 0;
  } else {
    for (int64_t n = 0; n < sequences; ++n) {
      const int64_t each = blocks_of(call.offsets[n + 1] - call.offsets[n]);
      blocks += each;
      used += each > 0;
    }
  }
  overflow |= __builtin_mul_overflow(blocks, heads, &list->count);
  if (overflow) return Status::ResourceExhausted("out of memory: 2**63 or more work items");
  list->pairs = used * heads;
  PERFORMER_RETURN_IF_ERROR(Allocate(list->count, "work items", &list->ranges));
  PERFORMER_RETURN_IF_ERROR(Allocate(list->pairs, "ends of work items", &list->ends));
  if (list->count == 0) return Status();

  WorkRange* range = list->ranges.get();
  int64_t* pair_end = list->ends.get();
  for (int64_t n = 0; n < sequences; ++n) {
    const int64_t begin = call.offsets ? call.offsets[n] : n * rows_per_batch;
    const int64_t end = call.offsets ? call.offsets[n + 1] : begin + rows_per_batch;
    if (begin == end && !keep_empty) continue;
    const int64_t block = rows_of(end - begin);
    for (int64_t head = 0; head < heads; ++head) {
      int64_t row = begin;
      do {
        const int64_t next = std::min(row + block, end);
        *range++ = {n, head, row, next};
        row = next;
      } while (row < end);
      *pair_end++ = range - list->ranges.get();
    }
  }
  return Status();
}

// The keys of the call: splits of every sequence, for each key/value head.
inline Status DivideKeys(const Common& call, WorkList* list) {
  return Divide(call, call.dims.groups, call.dims.keys, true, SplitRows, list);
}

// The keys of the call: whole sequences, for each key/value head.
inline Status DivideSequences(const Common& call, WorkList* list) {
  const auto all = [](int64_t rows) { return std::max<int64_t>(rows, 1); };
  return Divide(call, call.dims.groups, call.dims.keys, true, all, list);
}

// The queries of the call: blocks of rows_of(length) rows, for each query head.
template <class RowsOf>
Status DivideQueries(const Common& call, RowsOf rows_of, WorkList* list) {
  return Divide(call, call.dims.heads, call.dims.queries, false, rows_of, list);
}

// Runs body(item, i) for the items [first, last) in parallel; it returns false if it found no
// scratch memory.
template <class Body>
Status ForEachItem(const WorkList& list, int64_t first, int64_t last, int64_t cost_per_row,
                   const ParallelFor& parallel_for, Body body) {
  if (first == last) return Status();
  std::atomic<bool> ok{true};
  int64_t rows = 0, cost;
  for (int64_t i = first; i < last; ++i) rows += list.ranges[i].end - list.ranges[i].begin;
  if (__builtin_mul_overflow(rows / (last - first) + 1, cost_per_row, &cost)) cost = INT64_MAX;
  parallel_for(last - first, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!body(list.ranges[first + i], i)) ok = false;
  });
  return ok ? Status() : NoScratch();
}

// Partial results are kept for a wave of items at a time: those of whole pairs.
inline constexpr int64_t kWaveBytes = 32 << 20;

// Sizes that follow from those of a call do not overflow. The largest partial result is that of the
// causal gradient for a group of all heads; at least kMaxSplits of them are kept. Of a tensor's
// elements, each may have a work item.
static_assert(CausalGradPartial<double>::Size({kMaxWidth, kMaxWidth, kMaxWidth, kMaxWidth,
                                               kMaxWidth, kMaxWidth, 0, 0},
                                              kMaxHeads) <=
              INT64_MAX / (kMaxSplits * int64_t{sizeof(double)}));
static_assert(kMaxElements <= INT64_MAX / int64_t{2 * sizeof(WorkRange)});

// For each wave of items: body(item, partial) in parallel, then fold(first, last, partials) for the
// items of the wave in their order. `size` is the number of values in one partial result.
template <class Acc, class Body, class Fold>
Status ForWaves(const WorkList& list, int64_t size, int64_t cost_per_row,
                const ParallelFor& parallel_for, Body body, Fold fold) {
  const int64_t fit = kWaveBytes / (size * static_cast<int64_t>(sizeof(Acc)));
  const int64_t max_items = std::min(std::max(fit, kMaxSplits), list.count);
  Buffer<Acc> partials;
  PERFORMER_RETURN_IF_ERROR(Allocate(max_items * size, "partial results", &partials));
  for (int64_t pair = 0; pair < list.pairs;) {
    const int64_t first = pair == 0 ? 0 : list.ends[pair - 1];
    int64_t last = list.ends[pair++];
    while (pair < list.pairs && list.ends[pair] - first <= max_items) last = list.ends[pair++];
    const auto run = [&](const WorkRange& range, int64_t i) {
      return body(range, partials.get() + i * size);
    };
    PERFORMER_RETURN_IF_ERROR(ForEachItem(list, first, last, cost_per_row, parallel_for, run));
    fold(first, last, partials.get());
  }
  return Status();
}

}  // namespace cpu
}  // namespace performer
