// Runs CUDA kernels on the CPU as ordinary C++, for tests on machines without a GPU. Each CUDA
// thread is a fiber; blocks run one after another, and fibers are switched only where CUDA threads
// wait for each other. sim/cuda.h gives kernels the names they need, cuda/device/ptx.h the
// instructions.
//
// What it can find:
//   - wrong results, under several schedules: shared memory starts as NaN, asynchronous copies
//     happen as late as they are allowed to (in kRandom also at any moment before), and warps run
//     with the greatest skew (kForward, kReverse), with changing priorities (kRandom), or thread by
//     thread at random (kFair)
//   - deadlocks, barriers and warp instructions in divergent code, shuffles from lanes that do not
//     take part, misaligned copies and ldmatrix rows, copies in flight when a thread ends
//   - data races in shared memory and in tracked global memory, for any schedule (race.cc; with
//     -fsanitize=thread for its instrumentation)
//   - accesses out of bounds and undefined behaviour (with the compiler's own sanitizers)
//   - bank conflicts of ldmatrix, numbers of instructions (Counters)
//   - how much memory each kernel moves (Traffic; with the same instrumentation as races)
//   - tests that notice nothing: any barrier or wait can be left out (Options::skip)
//
// What it cannot find or run:
//   - errors in the PTX strings, and how a GPU rounds: mma adds as two published models of tensor
//     cores do (tensor_cores.h), exp2 and log2 are those of the host
//   - errors of memory order between the blocks of a launch: threads of one block do run ahead of
//     each other, but a GPU's weak ordering of global memory is not modelled. The race detector
//     calls every exchange between blocks a race
//   - time, occupancy, registers
//   - kernels that spin on another block: each block runs to its end before the next one starts
//   - static shared memory, which does not start as NaN: kernels use dynamic shared memory only
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "sim/tensor_cores.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// For functions that move values between threads' registers: the race detector must not take these
// for accesses to memory.
#if defined(__SANITIZE_THREAD__)
#define PERFORMER_SIM_REGISTERS __attribute__((no_sanitize("thread"), noinline))
#else
#define PERFORMER_SIM_REGISTERS
#endif

namespace performer {
namespace sim {

enum class Order {
  kForward,  // the lowest warp that can run always runs first
  kReverse,  // the highest
  kRandom,   // priorities of warps, shuffled now and then (as in probabilistic concurrency testing)
  kFair,     // any thread
};

struct Options {
  Order order = Order::kRandom;
  uint64_t seed = 1;
  std::string skip;  // site of a barrier or wait (as in Sites) that is left out
  TensorCores tensor_cores = TensorCores::kH100;
};
Options& TheOptions();

struct Counters {
  uint64_t blocks = 0, barriers = 0, shuffles = 0, copies = 0, exponentials = 0;
  uint64_t mma = 0;                 // instructions of a warp
  uint64_t ldmatrix = 0;            // likewise, four matrices each
  uint64_t ldmatrix_conflicts = 0;  // passes beyond one for a matrix
};
Counters& TheCounters();

// Barriers and waits that were reached, as "file:line".
std::set<std::string>& Sites();

// What a kernel did wrong. The sentence names block and thread.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Runs `body` as every thread of every block; blocks have a multiple of 32 threads, at most 1024.
// `name` is that of the kernel for Traffic.
void Launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& body);

// Launches that were captured instead of run, as those of a CUDA graph.
using Graph = std::vector<std::function<void()>>;
// Where Enqueue puts a launch; nullptr: it runs at once.
Graph*& TheGraph();
void Enqueue(const std::function<void()>& launch);

// ---- Called by threads of a kernel

// What CUDA calls threadIdx, blockIdx, blockDim and gridDim; and the lane in the warp.
struct Position {
  dim3 thread, block, block_dim, grid_dim;
  unsigned lane;
};
const Position& Here();  // of the current thread
unsigned char* SharedMemory();
[[noreturn]] void Fail(const std::string& message);

// __syncthreads(). `site` is a literal.
void SyncThreads(const char* site);
// __syncwarp(), the only warp operation that orders memory.
void SyncWarp(uint32_t mask, const char* site);
// Waits for the lanes of the mask, then calls apply(slots, mask) once; slots[lane] is what that
// lane gave.
void Collective(uint32_t mask, const char* name, void* slot, void (*apply)(void**, uint32_t));

// cp.async of `bytes` bytes, of which `valid` are read and the others are zero.
void CopyAsync(void* to, const void* from, int bytes, int valid);
void CopyAsyncCommit();
void CopyAsyncWait(int groups_left, const char* file, int line);

// ---- Global memory that the race detector watches

void Track(const void* begin, size_t bytes);
void UntrackAll();
// Different pairs of racing instructions so far, and a sentence for the first ones.
struct Races {
  unsigned count = 0;
  std::string report;
};
Races& TheRaces();
void ResetRaces();
// Whether this build has the detector.
bool DetectsRaces();

// ---- The memory that kernels move, in builds with the race detector (traffic.cc)

// Bytes moved by the launches of one name. Global memory is counted in sectors of 32 bytes, the
// smallest that a GPU moves, of buffers named to CountTraffic; loads, stores and cp.async alike.
struct Traffic {
  // Each sector once for a launch that reads, or writes, any byte of it: what comes from memory and
  // goes there if the caches keep everything for as long as the launch takes.
  uint64_t read = 0, written = 0;
  // Each sector once for each block that does: what the blocks ask of the L2 cache if the L1 cache
  // keeps everything for as long as the block takes.
  uint64_t block_read = 0, block_written = 0;
  // Shared memory: what each thread loads and stores, ldmatrix and cp.async included. A number that
  // a warp reads for all of its lanes at once counts 32 times.
  uint64_t shared_read = 0, shared_written = 0;
};
std::map<std::string, Traffic>& TheTraffic();  // since it was last cleared
void CountTraffic(const void* begin, size_t bytes);
void CountNoTraffic();  // forgets the buffers

}  // namespace sim
}  // namespace performer
