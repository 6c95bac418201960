// Counts the memory that kernels move, in builds whose kernels are instrumented (race.cc).
#include <cstring>
#include <map>

#include "sim/block.h"

namespace performer {
namespace sim {
namespace {

constexpr uintptr_t kSectorBytes = 32;

// The last launch and block, by their numbers, that read or wrote a sector.
struct Uses {
  uint32_t launch = 0, block = 0;
};
struct Sector {
  Uses read, write;
};
struct Buffer {
  size_t bytes = 0;
  std::vector<Sector> sectors;  // from the one on in which the buffer begins
};

struct Counter {
  std::map<uintptr_t, Buffer> buffers;
  uint32_t launch = 0, block = 0;  // that run now: numbers from 1 on
  Traffic* traffic = nullptr;      // of the launch
};

Counter& TheCounter() {
  static Counter counter;
  return counter;
}

void CountSector(Uses& uses, uint64_t* in_launch, uint64_t* in_block) {
  const Counter& counter = TheCounter();
  if (uses.launch != counter.launch) *in_launch += kSectorBytes;
  if (uses.block != counter.block) *in_block += kSectorBytes;
  uses = {counter.launch, counter.block};
}

}  // namespace

void TrafficLaunchBegins(const char* name) {
  ++TheCounter().launch;
  TheCounter().traffic = &TheTraffic()[name];
}
void TrafficBlockBegins() { ++TheCounter().block; }

void TrafficAccess(const void* at, size_t bytes, bool write) {
  Counter& counter = TheCounter();
  const Block* const block = TheBlock();
  if (block == nullptr || block->current == nullptr || bytes == 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(at);
  // Most accesses are to the thread's own stack, which stands for registers.
  if (begin - reinterpret_cast<uintptr_t>(block->current->stack) < kStackBytes) return;
  Traffic& traffic = *counter.traffic;
  if (begin - reinterpret_cast<uintptr_t>(block->shared) < block->shared_bytes) {
    (write ? traffic.shared_written : traffic.shared_read) += bytes;
    return;
  }
  const auto after = counter.buffers.upper_bound(begin);
  if (after == counter.buffers.begin()) return;
  auto& [start, buffer] = *std::prev(after);
  if (begin >= start + buffer.bytes) return;
  const uintptr_t first = start / kSectorBytes, last = (begin + bytes - 1) / kSectorBytes;
  for (uintptr_t i = begin / kSectorBytes; i <= last; ++i) {
    Sector& sector = buffer.sectors[i - first];
    if (write)
      CountSector(sector.write, &traffic.written, &traffic.block_written);
    else
      CountSector(sector.read, &traffic.read, &traffic.block_read);
  }
}

void CountTraffic(const void* begin, size_t bytes) {
  if (bytes == 0) return;
  Buffer& buffer = TheCounter().buffers[reinterpret_cast<uintptr_t>(begin)];
  buffer.bytes = bytes;
  buffer.sectors.assign(bytes / kSectorBytes + 2, {});
}
void CountNoTraffic() { TheCounter().buffers.clear(); }

}  // namespace sim
}  // namespace performer
