// Data races between emulated threads: exact happens-before, whatever the schedule was.
//
// Kernels are compiled with -fsanitize=thread: the compiler then calls __tsan_readN and
// __tsan_writeN at every access. The program is linked without that option, and the functions below
// stand in for the library. This file and the emulator are not instrumented.
//
// Every thread has a clock of what it knows of the others (a vector clock). __syncthreads and
// __syncwarp are the only events that pass knowledge on inside a launch; nothing does between
// blocks. An access races with an earlier one of the same bytes, one of the two a write, that its
// thread does not know of. Kept for every two bytes: the last write; for shared memory the last
// reads of each warp by two different lanes; for global memory (tracked buffers only) the last
// reads by two different blocks. So of many unordered reads before a write at least one is
// reported, not each. Atomic operations are performed and are no accesses.
#include <algorithm>
#include <cstdio>
#include <unordered_map>

#include "sim/block.h"

namespace performer {
namespace sim {
namespace {

using Clock = std::vector<uint32_t>;

struct Access {
  uint32_t block = 0, thread = 0, epoch = 0;  // epoch 0: none
  void* instruction = nullptr;
};
struct WarpReads {
  Access last, other_lane;
};
struct SharedCell {
  Access write;
  WarpReads reads[32];
};
struct GlobalCell {
  Access write, read, other_block;
};
struct Buffer {
  uintptr_t begin;
  size_t bytes;
};

struct Detector {
  bool busy = false;  // no recursion, should a function here be instrumented after all
  Block* block = nullptr;
  uint32_t block_number = 0;
  std::vector<Clock> clocks;  // of each thread
  std::unordered_map<unsigned, Clock> objects;
  std::vector<SharedCell> shared;
  std::unordered_map<uintptr_t, GlobalCell> global;
  std::vector<Buffer> buffers;
  std::set<std::pair<void*, void*>> reported;
};

Detector& The() {
  static Detector detector;
  return detector;
}

void Report(const char* kind, const char* where, size_t byte, const Access& before,
            const Access& now) {
  Detector& d = The();
  if (!d.reported.insert({before.instruction, now.instruction}).second) return;
  Races& races = TheRaces();
  if (++races.count > 20) return;
  char text[256];
  std::snprintf(text, sizeof text,
                "%s in %s memory, byte %zu: block %u thread %u (at %p), then block %u thread %u "
                "(at %p)\n",
                kind, where, byte, before.block, before.thread, before.instruction, now.block,
                now.thread, now.instruction);
  races.report += text;
}

bool Knows(const Access& now, const Access& before) {
  return before.epoch == 0 || before.thread == now.thread ||
         before.epoch <= The().clocks[now.thread][before.thread];
}

void SharedAccess(SharedCell& cell, size_t byte, bool write, const Access& now) {
  if (!Knows(now, cell.write))
    Report(write ? "write after write" : "read after write", "shared", byte, cell.write, now);
  WarpReads& mine = cell.reads[now.thread / 32];
  if (!write) {
    if (mine.last.epoch != 0 && mine.last.thread != now.thread) mine.other_lane = mine.last;
    mine.last = now;
    return;
  }
  for (size_t w = 0; w < The().block->warps.size(); ++w) {
    for (const Access& read : {cell.reads[w].last, cell.reads[w].other_lane})
      if (!Knows(now, read)) Report("write after read", "shared", byte, read, now);
    cell.reads[w] = WarpReads();
  }
  cell.write = now;
}

void GlobalAccess(GlobalCell& cell, size_t byte, bool write, const Access& now) {
  const auto knows = [&](const Access& before) {
    return before.epoch == 0 || (before.block == now.block && Knows(now, before));
  };
  if (!knows(cell.write))
    Report(write ? "write after write" : "read after write", "global", byte, cell.write, now);
  if (!write) {
    if (cell.read.epoch != 0 && cell.read.block != now.block) cell.other_block = cell.read;
    cell.read = now;
    return;
  }
  for (const Access& read : {cell.read, cell.other_block})
    if (!knows(read)) Report("write after read", "global", byte, read, now);
  cell.write = now;
}

void Record(const void* at, size_t bytes, bool write, void* instruction) {
  Detector& d = The();
  const unsigned thread = d.block->current->index;
  const Access now = {d.block_number, thread, d.clocks[thread][thread], instruction};
  const auto begin = reinterpret_cast<uintptr_t>(at);
  const auto shared = reinterpret_cast<uintptr_t>(d.block->shared);
  if (begin >= shared && begin < shared + d.block->shared_bytes) {
    const size_t first = (begin - shared) / 2, last = (begin - shared + bytes - 1) / 2;
    for (size_t cell = first; cell <= last && cell < d.shared.size(); ++cell)
      SharedAccess(d.shared[cell], cell * 2, write, now);
    return;
  }
  for (const Buffer& buffer : d.buffers)
    if (begin >= buffer.begin && begin < buffer.begin + buffer.bytes) {
      for (uintptr_t cell = begin / 2; cell <= (begin + bytes - 1) / 2; ++cell)
        GlobalAccess(d.global[cell], cell * 2 - buffer.begin, write, now);
      return;
    }
}

}  // namespace

void RaceBlockBegins(Block& block) {
  Detector& d = The();
  const unsigned count = block.block_dim.x * block.block_dim.y * block.block_dim.z;
  d.block = &block;
  ++d.block_number;
  d.objects.clear();
  d.clocks.assign(count, Clock(count, 0));
  for (unsigned i = 0; i < count; ++i) d.clocks[i][i] = 1;
  d.shared.assign((block.shared_bytes + 1) / 2, SharedCell());
}
void RaceBlockEnds() { The().block = nullptr; }
void RaceLaunchEnds() { The().global.clear(); }

void RaceRelease(unsigned object) {
  Detector& d = The();
  const unsigned thread = d.block->current->index;
  Clock &to = d.objects[object], &from = d.clocks[thread];
  to.resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
  ++from[thread];
}
void RaceAcquire(unsigned object) {
  Detector& d = The();
  const Clock& from = d.objects[object];
  Clock& to = d.clocks[d.block->current->index];
  for (size_t i = 0; i < to.size(); ++i) to[i] = std::max(to[i], from[i]);
}

void RaceAccess(const void* at, size_t bytes, bool write, void* instruction) {
  Detector& d = The();
  if (d.busy || d.block == nullptr || d.block->current == nullptr || bytes == 0) return;
  // Most accesses are to the thread's own stack.
  const auto begin = reinterpret_cast<uintptr_t>(at);
  const auto stack = reinterpret_cast<uintptr_t>(d.block->current->stack);
  if (begin - stack < kStackBytes) return;
  d.busy = true;
  Record(at, bytes, write, instruction);
  d.busy = false;
}

void Track(const void* begin, size_t bytes) {
  if (bytes > 0) The().buffers.push_back({reinterpret_cast<uintptr_t>(begin), bytes});
}
void UntrackAll() {
  The().buffers.clear();
  The().global.clear();
}
void ResetRaces() {
  TheRaces() = Races();
  The().reported.clear();
}
bool DetectsRaces() { return true; }

}  // namespace sim
}  // namespace performer

extern "C" {
#define PERFORMER_SIM_HOOK(N)                                             \
  void __tsan_read##N(void* p) {                                          \
    performer::sim::RaceAccess(p, N, false, __builtin_return_address(0)); \
  }                                                                       \
  void __tsan_write##N(void* p) {                                         \
    performer::sim::RaceAccess(p, N, true, __builtin_return_address(0));  \
  }                                                                       \
  void __tsan_unaligned_read##N(void* p) {                                \
    performer::sim::RaceAccess(p, N, false, __builtin_return_address(0)); \
  }                                                                       \
  void __tsan_unaligned_write##N(void* p) {                               \
    performer::sim::RaceAccess(p, N, true, __builtin_return_address(0));  \
  }
PERFORMER_SIM_HOOK(1)
PERFORMER_SIM_HOOK(2)
PERFORMER_SIM_HOOK(4)
PERFORMER_SIM_HOOK(8)
PERFORMER_SIM_HOOK(16)
void __tsan_read_range(void* p, unsigned long n) {
  performer::sim::RaceAccess(p, n, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, unsigned long n) {
  performer::sim::RaceAccess(p, n, true, __builtin_return_address(0));
}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define PERFORMER_SIM_ATOMIC(BITS, T)                                                       \
  T __tsan_atomic##BITS##_load(const volatile T* a, int) {                                  \
    return __atomic_load_n(a, __ATOMIC_SEQ_CST);                                            \
  }                                                                                         \
  void __tsan_atomic##BITS##_store(volatile T* a, T v, int) {                               \
    __atomic_store_n(a, v, __ATOMIC_SEQ_CST);                                               \
  }                                                                                         \
  T __tsan_atomic##BITS##_fetch_add(volatile T* a, T v, int) {                              \
    return __atomic_fetch_add(a, v, __ATOMIC_SEQ_CST);                                      \
  }                                                                                         \
  int __tsan_atomic##BITS##_compare_exchange_strong(volatile T* a, T* c, T v, int, int) {   \
    return __atomic_compare_exchange_n(a, c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }                                                                                         \
  int __tsan_atomic##BITS##_compare_exchange_weak(volatile T* a, T* c, T v, int, int) {     \
    return __atomic_compare_exchange_n(a, c, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }
PERFORMER_SIM_ATOMIC(8, char)
PERFORMER_SIM_ATOMIC(32, int)
PERFORMER_SIM_ATOMIC(64, long)
}
