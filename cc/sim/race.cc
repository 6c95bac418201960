// Data races between emulated threads: exact happens-before, whatever the schedule was.
//
// Kernels are compiled with -fsanitize=thread: the compiler then calls __tsan_readN and
// __tsan_writeN at every access. The program is linked without that option, and the functions below
// stand in for the library. They also count traffic (traffic.cc). This file and the emulator are not
// instrumented.
//
// Every thread has a vector clock: for each thread, the last of its epochs whose accesses this
// thread knows of. Inside a launch only __syncthreads and __syncwarp pass this knowledge on, and
// nothing passes it between blocks. An access races with an earlier one of the same bytes that its
// thread does not know of, where one of the two is a write.
//
// Every two bytes keep the last write; in shared memory the last reads by two different lanes of
// each warp; in global memory (tracked buffers only) the last reads by two different blocks. So at
// least one of many unordered reads before a write is reported, but not each. Atomic operations are
// performed and do not count as accesses.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>

#include "sim/block.h"

namespace performer {
namespace sim {
namespace {

// Addresses of instructions are stored relative to this one, in 32 bits.
char* Origin() { return reinterpret_cast<char*>(&Origin); }

struct Access {
  uint32_t epoch = 0;  // 0: none
  uint32_t thread = 0;
  int32_t instruction = 0;
};
struct WarpReads {
  Access last, other_lane;
};
// Two bytes of shared memory. The content counts only in block number `block`, so that nothing has
// to be cleared between blocks.
struct SharedCell {
  uint32_t block = 0;
  uint32_t readers = 0;  // bit w: warp w has read since the last write
  Access write;
};
struct GlobalAccess {
  Access access;
  uint32_t block = 0;
};
// Two bytes of global memory. Accesses by blocks of earlier launches do not count.
struct GlobalCell {
  GlobalAccess write, read, other_block;
};
struct FreeDeleter {
  void operator()(GlobalCell* p) const { std::free(p); }
};
struct Buffer {
  size_t bytes = 0;
  // [bytes / 2], from calloc: pages that are never touched cost nothing.
  std::unique_ptr<GlobalCell, FreeDeleter> cells;
};

struct Detector {
  bool recording = false;  // prevents recursion, should a function here be instrumented after all
  Block* block = nullptr;
  uint32_t block_number = 0, first_of_launch = 1;
  size_t threads = 0, warps = 0;
  std::vector<uint32_t> clocks;                // [thread][thread]: row t is the clock of thread t
  std::vector<std::vector<uint32_t>> objects;  // their clocks; empty until the first release
  std::vector<SharedCell> shared;
  std::vector<WarpReads> reads;  // [cell][warp]; valid where the bit in `readers` is set
  std::map<uintptr_t, Buffer> buffers;
  std::set<std::pair<int32_t, int32_t>> reported;
};

Detector& TheDetector() {
  static Detector detector;
  return detector;
}

void Report(const char* kind, const char* where, size_t byte, const Access& before,
            uint32_t block_before, const Access& now) {
  Detector& d = TheDetector();
  if (!d.reported.insert({before.instruction, now.instruction}).second) return;
  // A run with a skipped barrier ends with its first race: that is all its test asks for.
  if (!TheOptions().skip.empty() && d.block->error.empty()) d.block->error = "data race";
  Races& races = TheRaces();
  if (++races.count > 20) return;
  char text[256];
  std::snprintf(text, sizeof text,
                "%s in %s memory, byte %zu: block %u thread %u (at %p), then block %u thread %u "
                "(at %p)\n",
                kind, where, byte, block_before, before.thread,
                static_cast<void*>(Origin() + before.instruction), d.block_number, now.thread,
                static_cast<void*>(Origin() + now.instruction));
  races.report += text;
}

bool HappensBefore(const Access& before, const Access& now) {
  const Detector& d = TheDetector();
  return before.epoch == 0 || before.thread == now.thread ||
         before.epoch <= d.clocks[now.thread * d.threads + before.thread];
}

void RecordShared(size_t index, bool write, const Access& now) {
  Detector& d = TheDetector();
  SharedCell& cell = d.shared[index];
  if (cell.block != d.block_number) cell = {d.block_number, 0, {}};
  const auto report = [&](const char* kind, const Access& before) {
    Report(kind, "shared", index * 2, before, d.block_number, now);
  };
  if (!HappensBefore(cell.write, now))
    report(write ? "write after write" : "read after write", cell.write);
  WarpReads* const reads = &d.reads[index * d.warps];
  if (!write) {
    WarpReads& own_warp = reads[now.thread / 32];
    const uint32_t bit = 1u << now.thread / 32;
    if ((cell.readers & bit) == 0) {
      own_warp = WarpReads();
      cell.readers |= bit;
    } else if (own_warp.last.thread != now.thread) {
      own_warp.other_lane = own_warp.last;
    }
    own_warp.last = now;
    return;
  }
  for (size_t w = 0; cell.readers >> w != 0; ++w) {
    if ((cell.readers >> w & 1) == 0) continue;
    for (const Access& read : {reads[w].last, reads[w].other_lane})
      if (!HappensBefore(read, now)) report("write after read", read);
    if (w == 31) break;
  }
  cell.readers = 0;
  cell.write = now;
}

void RecordGlobal(GlobalCell& cell, size_t byte, bool write, const Access& now) {
  Detector& d = TheDetector();
  const auto check = [&](const GlobalAccess& before, const char* kind) {
    if (before.access.epoch == 0 || before.block < d.first_of_launch) return;
    if (before.block != d.block_number || !HappensBefore(before.access, now))
      Report(kind, "global", byte, before.access, before.block, now);
  };
  check(cell.write, write ? "write after write" : "read after write");
  const GlobalAccess access = {now, d.block_number};
  if (!write) {
    if (cell.read.access.epoch != 0 && cell.read.block != access.block)
      cell.other_block = cell.read;
    cell.read = access;
    return;
  }
  check(cell.read, "write after read");
  check(cell.other_block, "write after read");
  cell.write = access;
}

void Record(const void* at, size_t bytes, bool write, void* instruction) {
  Detector& d = TheDetector();
  const unsigned thread = d.block->current->index;
  const Access now = {d.clocks[thread * d.threads + thread], thread,
                      static_cast<int32_t>(static_cast<char*>(instruction) - Origin())};
  const auto begin = reinterpret_cast<uintptr_t>(at);
  const auto shared = reinterpret_cast<uintptr_t>(d.block->shared);
  if (begin >= shared && begin < shared + d.block->shared_bytes) {
    const size_t first = (begin - shared) / 2;
    const size_t last = (std::min(begin - shared + bytes, d.block->shared_bytes) - 1) / 2;
    for (size_t cell = first; cell <= last; ++cell) RecordShared(cell, write, now);
    return;
  }
  const auto after = d.buffers.upper_bound(begin);
  if (after == d.buffers.begin()) return;
  const auto& [start, buffer] = *std::prev(after);
  if (begin >= start + buffer.bytes) return;
  const size_t first = (begin - start) / 2;
  const size_t last = (std::min(begin - start + bytes, buffer.bytes) - 1) / 2;
  for (size_t cell = first; cell <= last; ++cell)
    RecordGlobal(buffer.cells.get()[cell], cell * 2, write, now);
}

// Merges the clock `from` into `to`: the later epoch of each thread. Blocks have a multiple of 32
// threads.
void Join(std::vector<uint32_t>::iterator to, std::vector<uint32_t>::const_iterator from,
          size_t threads) {
  for (size_t first = 0; first < threads; first += 32)
    for (size_t i = 0; i < 32; ++i) to[first + i] = std::max(to[first + i], from[first + i]);
}

}  // namespace

void RaceBlockBegins(Block& block) {
  Detector& d = TheDetector();
  d.block = &block;
  ++d.block_number;
  d.threads = block.block_dim.x * block.block_dim.y * block.block_dim.z;
  d.warps = d.threads / 32;
  d.objects.clear();
  d.clocks.assign(d.threads * d.threads, 0);
  for (size_t i = 0; i < d.threads; ++i) d.clocks[i * d.threads + i] = 1;
  const size_t cells = (block.shared_bytes + 1) / 2;
  if (d.shared.size() < cells) d.shared.resize(cells);
  if (d.reads.size() < cells * d.warps) d.reads.resize(cells * d.warps);
}
void RaceBlockEnds() { TheDetector().block = nullptr; }
void RaceLaunchEnds() { TheDetector().first_of_launch = TheDetector().block_number + 1; }

void RaceRelease(unsigned object) {
  Detector& d = TheDetector();
  const unsigned thread = d.block->current->index;
  if (d.objects.size() <= object) d.objects.resize(object + 1);
  if (d.objects[object].empty()) d.objects[object].resize(d.threads);
  const auto own = d.clocks.begin() + thread * d.threads;
  Join(d.objects[object].begin(), own, d.threads);
  ++own[thread];
}
void RaceAcquire(unsigned object) {
  Detector& d = TheDetector();
  Join(d.clocks.begin() + d.block->current->index * d.threads, d.objects[object].begin(),
       d.threads);
}

void RaceAccess(const void* at, size_t bytes, bool write, void* instruction) {
  Detector& d = TheDetector();
  if (d.recording || d.block == nullptr || d.block->current == nullptr || bytes == 0) return;
  // Most accesses are to the thread's own stack.
  const auto begin = reinterpret_cast<uintptr_t>(at);
  const auto stack = reinterpret_cast<uintptr_t>(d.block->current->stack);
  if (begin - stack < kStackBytes) return;
  d.recording = true;
  Record(at, bytes, write, instruction);
  d.recording = false;
}

void Track(const void* begin, size_t bytes) {
  if (bytes == 0) return;
  auto* cells = static_cast<GlobalCell*>(std::calloc((bytes + 1) / 2, sizeof(GlobalCell)));
  if (cells == nullptr) throw Error("no memory for the race detector");
  Buffer& buffer = TheDetector().buffers[reinterpret_cast<uintptr_t>(begin)];
  buffer.bytes = bytes;
  buffer.cells.reset(cells);
}
void UntrackAll() { TheDetector().buffers.clear(); }
void ResetRaces() {
  TheRaces() = Races();
  TheDetector().reported.clear();
}
bool DetectsRaces() { return true; }

}  // namespace sim
}  // namespace performer

namespace {

void Access(const void* at, size_t bytes, bool write, void* instruction) {
  performer::sim::TrafficAccess(at, bytes, write);
  performer::sim::RaceAccess(at, bytes, write, instruction);
}

}  // namespace

extern "C" {
#define PERFORMER_SIM_HOOK(N)                                                                  \
  void __tsan_read##N(void* p) { Access(p, N, false, __builtin_return_address(0)); }           \
  void __tsan_write##N(void* p) { Access(p, N, true, __builtin_return_address(0)); }           \
  void __tsan_unaligned_read##N(void* p) { Access(p, N, false, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##N(void* p) { Access(p, N, true, __builtin_return_address(0)); }
PERFORMER_SIM_HOOK(1)
PERFORMER_SIM_HOOK(2)
PERFORMER_SIM_HOOK(4)
PERFORMER_SIM_HOOK(8)
PERFORMER_SIM_HOOK(16)
void __tsan_read_range(void* p, unsigned long n) {
  Access(p, n, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, unsigned long n) {
  Access(p, n, true, __builtin_return_address(0));
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
