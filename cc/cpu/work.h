// How the drivers divide a call into work items, and memory for their partial results.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

#include "core/chunks.h"
#include "cpu/layout.h"
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
// head ends in the list.
struct WorkList {
  std::vector<Slice> slices;
  std::vector<int64_t> ends;
};

// One item for each sequence, head and block of `rows_of(length)` rows. A sequence without rows has
// one empty item if `keep_empty`.
template <class RowsOf>
WorkList Divide(const Common& call, int64_t heads, int64_t rows_per_batch, bool keep_empty,
                RowsOf rows_of) {
  WorkList list;
  for (int64_t n = 0; n < call.dims.sequences; ++n) {
    const int64_t begin = call.offsets ? call.offsets[n] : n * rows_per_batch;
    const int64_t end = call.offsets ? call.offsets[n + 1] : begin + rows_per_batch;
    const int64_t block = rows_of(end - begin);
    for (int64_t head = 0; head < heads; ++head) {
      if (begin == end && keep_empty) list.slices.push_back({n, head, begin, end});
      for (int64_t row = begin; row < end; row += block)
        list.slices.push_back({n, head, row, std::min(row + block, end)});
      list.ends.push_back(static_cast<int64_t>(list.slices.size()));
    }
  }
  return list;
}

// Runs body(item, i) for the items [first, last) in parallel; false if one of them returned false.
template <class Body>
bool ForEachItem(const WorkList& list, int64_t first, int64_t last, int64_t cost_per_row,
                 const ParallelFor& parallel_for, Body body) {
  if (first == last) return true;
  std::atomic<bool> ok{true};
  int64_t rows = 0;
  for (int64_t i = first; i < last; ++i) rows += list.slices[i].end - list.slices[i].begin;
  const int64_t cost = (rows / (last - first) + 1) * cost_per_row;
  parallel_for(last - first, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!body(list.slices[first + i], i)) ok = false;
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
  const int64_t items = static_cast<int64_t>(list.slices.size());
  const int64_t fit = kWaveBytes / (size * static_cast<int64_t>(sizeof(Acc)));
  const int64_t most = std::min(std::max(fit, kMaxSegments), items);
  Buffer<Acc> partials;
  PERFORMER_RETURN_IF_ERROR(Allocate(most * size, "partial results", &partials));
  for (size_t pair = 0; pair < list.ends.size();) {
    const int64_t first = pair == 0 ? 0 : list.ends[pair - 1];
    int64_t last = list.ends[pair++];
    while (pair < list.ends.size() && list.ends[pair] - first <= most) last = list.ends[pair++];
    const auto run = [&](const Slice& slice, int64_t i) {
      return body(slice, partials.get() + i * size);
    };
    if (!ForEachItem(list, first, last, cost_per_row, parallel_for, run))
      return Status::ResourceExhausted(kNoScratch);
    fold(first, last, partials.get());
  }
  return Status();
}

}  // namespace cpu
}  // namespace performer
