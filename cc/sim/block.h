// Inside the emulator: the fibers of one block, and what its parts know of them.
#pragma once
#include <vector>

#include "sim/emulator.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace performer {
namespace sim {

struct Warp;

// Lanes that wait for each other in one warp instruction.
struct Rendezvous {
  uint32_t mask = 0, arrived = 0;
  unsigned generation = 0;
  const char* name = nullptr;
  void* slots[32] = {};
};

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

// Where a fiber, or the scheduler, goes on.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  // For AddressSanitizer. The scheduler's stack is learnt from the first switch away from it.
  const void* stack = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;
};

struct Fiber {
  char* stack = nullptr;
  Place place;
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
  std::vector<unsigned> priorities;  // of warps, the first one first
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
  Context main;  // of the scheduler
};

inline constexpr size_t kStackBytes = 512 << 10;

Block* TheBlock();  // that runs now, or nullptr

// The race detector's part: a thread hands its knowledge to an object, or takes what others left
// there. Barrier generations are objects 0 and 1, __syncwarp has others.
void RaceBlockBegins(Block& block);
void RaceBlockEnds();
void RaceLaunchEnds();  // orders everything
void RaceRelease(unsigned object);
void RaceAcquire(unsigned object);
void RaceAccess(const void* at, size_t bytes, bool write, void* instruction);

}  // namespace sim
}  // namespace performer
