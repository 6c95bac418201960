// Runs kernels of PTX: blocks one after another, warps by turns, the lanes of a warp together.
//
// Lanes that part at a branch run apart, those at the smallest instruction first, and join where
// they meet. What needs certain lanes (shfl.sync, vote.sync, bar, mma, ldmatrix) waits for them, and
// is an error where they never come. Shared memory and registers start as 0xFF. Asynchronous copies
// happen as late as they may: when they are waited for (in random schedules also at once).
#pragma once
#include <cstdint>
#include <deque>
#include <set>
#include <string>
#include <vector>

#include "ptx/memory.h"
#include "ptx/program.h"
#include "sim/tensor_cores.h"

namespace performer {
namespace ptx {

inline constexpr int kLanes = 32;
inline constexpr uint32_t kAll = ~0u;

// Where the spaces begin. Shared memory lies behind the 1 KiB that the system has of it.
inline constexpr uint64_t kParamBase = 0, kLocalBase = 64, kSharedBase = 1024;
// Generic addresses of shared memory and of local memory; the others are those of global memory.
inline constexpr uint64_t kSharedWindow = uint64_t{1} << 62, kLocalWindow = uint64_t{1} << 61;

// As dim3 of CUDA.
struct Size {
  unsigned x = 1, y = 1, z = 1;
};

enum class Order { kForward, kReverse, kRandom };  // as sim::Order

struct Options {
  Order order = Order::kRandom;
  uint64_t seed = 1;
  sim::TensorCores tensor_cores = sim::TensorCores::kH100;
  // Whether fma.rn rounds once, as it must; otherwise twice, as what nvcc made it of: x * y + z.
  bool fused = true;
};
Options& TheOptions();

struct Launch {
  Kernel* kernel = nullptr;
  Size grid, block;
  uint32_t shared_bytes = 0;
  const unsigned char* params = nullptr;  // [kernel->param_bytes]
};
// Throws Error, which names kernel, instruction, block and warp.
void Run(const Launch& launch);

// "%tid.x" and the like.
bool IsSpecial(const std::string& name);

class Block;

class Warp {
 public:
  Warp(Block* block, unsigned index);

  enum class State { kReady, kAtBarrier, kDone };
  State state() const { return state_; }
  // Goes on until it waits at the barrier, has ended, or has taken so many steps; returns how many.
  uint64_t Run(uint64_t most);
  void LeaveBarrier() { state_ = State::kReady; }
  std::string Where() const;

  // ---- For instructions

  uint32_t* Words(Place place) { return registers_.data() + place; }
  uint64_t* Doubles(Place place) { return reinterpret_cast<uint64_t*>(Words(place)); }
  uint64_t AddressIn(const Address& address, int lane);
  // Throws Error if the bytes are not there or not aligned to `alignment`.
  unsigned char* Locate(Space space, uint64_t address, int bytes, int alignment, bool write,
                        int lane);
  // Copies to shared memory `bytes`, of which `valid` are read; the others are zero.
  void CopyAsync(int lane, uint64_t to, uint64_t from, int bytes, int valid);
  void CommitCopies(int lane);
  void WaitForCopies(int lane, size_t groups_left);

 private:
  // Lanes that are together.
  struct Group {
    uint32_t at, lanes;
    bool waits;
  };
  struct Copy {
    uint64_t to, from;
    int bytes, valid;
  };
  struct Copies {
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
  };

  void Part(uint32_t target, uint32_t taken);
  void Exit(uint32_t lanes);
  // Chooses who goes on.
  void Choose();
  uint32_t MembersOf(const Instruction& instruction, uint32_t lanes);
  void Perform(int lane, const Copy& copy);

  Block* const block_;
  const unsigned index_;
  State state_ = State::kReady;
  Group now_;
  std::vector<Group> others_;
  std::vector<uint32_t> registers_;
  std::vector<unsigned char> local_;
  Copies copies_[kLanes];
};

}  // namespace ptx
}  // namespace performer
