// How the drivers divide a call into work items, and memory for their partial results.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "core/splits.h"
#include "cpu/memory/layout.h"
#include "cpu/run.h"

namespace performer {
namespace cpu {

inline constexpr char kNoScratch[] = "out of memory for scratch rows";

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], FreeDeleter>;

// `count` values on a cache line, or an error that says what they are for.
template <class T>
Status Allocate(int64_t count, const char* purpose, Buffer<T>* buffer) {
  int64_t bytes;
  void* block = nullptr;
  if (__builtin_mul_overflow(count, static_cast<int64_t>(sizeof(T)), &bytes) ||
      posix_memalign(&block, kAlignment, static_cast<size_t>(bytes > 0 ? bytes : 1)) != 0)
    return Status::ResourceExhausted("out of memory: " + std::to_string(count) + " values for " +
                                     purpose);
  buffer->reset(static_cast<T*>(block));
  return Status();
}

// Work items of a call, ordered by sequence, head and row; `ends` marks where each sequence and
// head that has items ends in the list.
struct WorkList {
  Buffer<WorkRange> ranges;
  Buffer<int64_t> ends;
  int64_t count = 0, pairs = 0;  // ranges; ends
};

// One item for each sequence, head and block of `rows_of(length)` rows. A sequence without rows has
// one empty item if `keep_empty`, else none.
template <class RowsOf>
Status Divide(const Common& call, int64_t heads, int64_t rows_per_batch, bool keep_empty,
              RowsOf rows_of, WorkList* list) {
  const int64_t sequences = call.dims.sequences;
  const auto blocks_of = [&](int64_t rows) {
    const int64_t block = rows_of(rows);
    return rows > 0 ? (rows - 1) / block + 1 : int64_t{keep_empty};
  };
  int64_t blocks = 0, used = 0;  // of all sequences for one head; sequences that have some
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

// Runs body(item, i) for the items [first, last) in parallel; false if one of them returned false.
template <class Body>
bool ForEachItem(const WorkList& list, int64_t first, int64_t last, int64_t cost_per_row,
                 const ParallelFor& parallel_for, Body body) {
  if (first == last) return true;
  std::atomic<bool> ok{true};
  int64_t rows = 0;
  for (int64_t i = first; i < last; ++i) rows += list.ranges[i].end - list.ranges[i].begin;
  const int64_t cost = (rows / (last - first) + 1) * cost_per_row;
  parallel_for(last - first, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!body(list.ranges[first + i], i)) ok = false;
  });
  return ok;
}

// Partial results are kept for a wave of whole (sequence, head) pairs at a time.
inline constexpr int64_t kWaveBytes = 32 << 20;

// For waves of items: body(item, partial) in parallel, then fold(first, last, partials) for the
// wave's items in their order. `size` is that of one partial result.
template <class Acc, class Body, class Fold>
Status ForWaves(const WorkList& list, int64_t size, int64_t cost_per_row,
                const ParallelFor& parallel_for, Body body, Fold fold) {
  const int64_t fit = kWaveBytes / (size * static_cast<int64_t>(sizeof(Acc)));
  const int64_t most = std::min(std::max(fit, kMaxSplits), list.count);
  Buffer<Acc> partials;
  PERFORMER_RETURN_IF_ERROR(Allocate(most * size, "partial results", &partials));
  for (int64_t pair = 0; pair < list.pairs;) {
    const int64_t first = pair == 0 ? 0 : list.ends[pair - 1];
    int64_t last = list.ends[pair++];
    while (pair < list.pairs && list.ends[pair] - first <= most) last = list.ends[pair++];
    const auto run = [&](const WorkRange& range, int64_t i) {
      return body(range, partials.get() + i * size);
    };
    if (!ForEachItem(list, first, last, cost_per_row, parallel_for, run))
      return Status::ResourceExhausted(kNoScratch);
    fold(first, last, partials.get());
  }
  return Status();
}

}  // namespace cpu
}  // namespace performer
