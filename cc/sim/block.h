// Internal to the emulator: the fibers of one block, and the interfaces of the race detector and of
// the counter of traffic.
#pragma once
#include <vector>

#include "sim/emulator.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace performer {
namespace sim {

struct Warp;

// Where the lanes of `mask` wait for each other in one warp instruction.
struct Rendezvous {
  uint32_t mask = 0, arrived = 0;
  unsigned generation = 0;
  const char* name = nullptr;
  void* slots[32] = {};
};

// A cp.async of `bytes`: `valid` of them are read, the others become zero.
struct Copy {
  void* to;          // [bytes] in shared memory
  const void* from;  // [valid] in global memory
  int bytes, valid;
};

// Where a fiber, or the scheduler, will be resumed.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  // For AddressSanitizer. The stack of the scheduler becomes known with the first switch from it.
  const void* stack = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;
};

struct Fiber {
  char* stack = nullptr;
  Position position;
  unsigned index = 0;  // in the block
  Warp* warp = nullptr;
  bool done = false;
  const char* waits_at = "the start";
  std::vector<std::vector<Copy>> groups;  // of cp.async, the oldest first
  std::vector<Copy> open;                 // not committed yet
  Context context;
};

struct Warp {
  std::vector<Rendezvous> rendezvous;
  Fiber* ready[32] = {};
  unsigned ready_count = 0;
};

struct Block {
  dim3 block_dim, grid_dim, index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned> priorities;  // indices of warps, the highest priority first
  Order order = Order::kRandom;
  unsigned ready_count = 0, live = 0;
  unsigned arrived = 0, generation = 0;  // at the barrier
  const char* barrier_site = nullptr;
  std::vector<Fiber*> at_barrier;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  Fiber* current = nullptr;
  uint64_t random = 1;
  const std::function<void()>* body = nullptr;
  std::string error;
  Context scheduler;
};

inline constexpr size_t kStackBytes = 512 << 10;

Block* TheBlock();  // that runs now, or nullptr

// The race detector (race.cc, or no_race.cc). Release merges the clock of the current thread into
// an object, Acquire merges the object's clock into the thread's. Objects 0 and 1 are the even and
// odd generations of __syncthreads; __syncwarp has others.
void RaceBlockBegins(Block& block);
void RaceBlockEnds();
void RaceLaunchEnds();  // orders everything
void RaceRelease(unsigned object);
void RaceAcquire(unsigned object);
void RaceAccess(const void* at, size_t bytes, bool write, void* instruction);

// Traffic (traffic.cc, or no_race.cc).
void TrafficLaunchBegins(const char* name);
void TrafficBlockBegins();
void TrafficAccess(const void* at, size_t bytes, bool write);

}  // namespace sim
}  // namespace performer
