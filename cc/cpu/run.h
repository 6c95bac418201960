// The operators on the CPU: division of work among threads, merging of partial results, dispatch to
// the instruction set.
#pragma once
#include <cstdint>
#include <functional>

#include "core/params.h"
#include "core/status.h"

namespace performer {
namespace cpu {

// Calls body(begin, end) for ranges that cover [0, count) once, in any order, on any threads, and
// returns when all are done. `cost` is that of one item, in nanoseconds.
using ParallelFor = std::function<void(int64_t count, int64_t cost,
                                       const std::function<void(int64_t, int64_t)>& body)>;

// The threads of a caller. How many there are may decide how work is divided among them, and
// changes no bit of a result.
struct Threads {
  int64_t count = 1;  // that run at the same time, at best
  ParallelFor parallel_for;
};

// Runs one operator. The shapes of the call have been accepted by InferShapes, its offsets by
// ValidateOffsets. Every output is written. Results are the same bits for any `threads`, batch
// size and number of heads. `isa`: "", the best of this processor or what the environment variable
// PERFORMER_ISA names; or one of AvailableIsas(). Errors: InvalidArgument for an unknown or
// unusable isa, ResourceExhausted if there is no memory.
Status Run(Op op, const Call& call, const Threads& threads, const std::string& isa = "");

// Instruction sets that were compiled and that this processor has, the best one last.
std::vector<std::string> AvailableIsas();

// The one in force: the best, or PERFORMER_ISA. Errors: InvalidArgument if that names none of
// AvailableIsas().
Status ChosenIsa(std::string* isa);

}  // namespace cpu
}  // namespace performer
