// The operators on the CPU: they divide the work among threads, call the kernels of the best
// instruction set, and merge partial results.
#pragma once
#include <cstdint>
#include <functional>

#include "core/params.h"
#include "core/status.h"

namespace performer {
namespace cpu {

// Calls body(begin, end) for ranges that together cover [0, count) once, in any order and on any
// threads, and returns when all calls are done. `cost` is the cost of one item in nanoseconds.
using ParallelFor = std::function<void(int64_t count, int64_t cost,
                                       const std::function<void(int64_t, int64_t)>& body)>;

// The threads of a caller. Their number may decide how work is divided among them, but changes no
// bit of a result.
struct Threads {
  int64_t count = 1;  // the most that run at the same time
  ParallelFor parallel_for;
};

// Runs one operator. InferShapes has accepted the shapes of the call, and CheckOffsets its
// offsets. Every output is written. Results are the same bits for any `threads`, batch size, number
// of heads and floating-point mode of the threads (floating_point.h). `isa` is one of AvailableIsas(), or "" for the one in force (ChosenIsa). Errors:
// InvalidArgument for an unknown or unusable isa, ResourceExhausted if there is no memory.
Status Run(Op op, const Call& call, const Threads& threads, const std::string& isa = "");

// The instruction sets that were compiled and that this processor has; the best is the last.
std::vector<std::string> AvailableIsas();

// The instruction set in force: the best, or the one that the environment variable PERFORMER_ISA
// names. Errors: InvalidArgument if it names none of AvailableIsas().
Status ChosenIsa(std::string* isa);

}  // namespace cpu
}  // namespace performer
