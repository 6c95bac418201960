// How many states of far keys bidirectional near-and-far attention keeps at a time. The state of a
// block of keys may be larger than its values. So the states of some blocks only are kept, a
// section, and others are made twice: first on the way to checkpoints, then again when their section
// comes.
#pragma once
#include <cstdint>

#include "core/indices.h"

namespace performer {
namespace cpu {

// Blocks that share what is merged of the blocks before and after them. It decides in which order
// states are merged, and so the bits.
inline constexpr int64_t kFarGroup = 4;

struct FarPlan {
  int64_t blocks = 0;   // of the sequence
  int64_t section = 0;  // blocks whose states are kept at a time: a multiple of kFarGroup
  int64_t step = 0;     // blocks that are worked on at a time: kFarGroup or a section
  // Whether reversed states lie among the states that they are made from (FarStates).
  bool with_reversed = false;
  static constexpr int64_t kReversedBefore = kFarGroup + 1;

  // Slots in the ring of block states: a section, its two neighbours and, with reversed states, what
  // these need to follow behind.
  PERFORMER_INLINE constexpr int64_t Slots() const {
    return section + 2 + (with_reversed ? kReversedBefore + kFarGroup : 0);
  }
  PERFORMER_INLINE constexpr int64_t Prefixes() const { return step / kFarGroup; }
  PERFORMER_INLINE constexpr int64_t Ends() const { return section / kFarGroup; }
  PERFORMER_INLINE constexpr int64_t Checkpoints() const { return CeilDiv(blocks, section); }
  // States that are kept in all.
  PERFORMER_INLINE constexpr int64_t States() const {
    const int64_t of_groups = Prefixes() + Ends() + Checkpoints() + 1;
    return Slots() + (with_reversed ? 2 : 1) * of_groups;
  }
};

// The plan with the longest section that keeps at most `budget` states; where no section does, the
// one that keeps the fewest: about 2 sqrt(blocks). With `whole_steps` a step is a section, whose blocks
// several threads share.
PERFORMER_INLINE constexpr FarPlan PlanFarStates(int64_t blocks, bool with_reversed,
                                                 bool whole_steps, int64_t budget) {
  FarPlan least, plan;
  plan.blocks = blocks, plan.with_reversed = with_reversed;
  const int64_t longest = RoundUp(blocks > 0 ? blocks : 1, kFarGroup);
  for (int64_t section = longest; section > 0; section -= kFarGroup) {
    plan.section = section;
    plan.step = whole_steps ? section : kFarGroup;
    if (plan.States() <= budget) return plan;
    if (section == longest || plan.States() < least.States()) least = plan;
  }
  return least;
}

}  // namespace cpu
}  // namespace performer
