// The states that near-and-far attention keeps at a time: within the budget wherever a section of
// any length is, and otherwise no more than about three times the root of the number of blocks.
#include "cpu/far_plan.h"

#include <cstdio>
#include <initializer_list>

using namespace performer::cpu;

namespace {

int failures = 0;

void Expect(bool holds, const char* what, const FarPlan& plan, int64_t budget) {
  if (holds) return;
  std::fprintf(stderr, "%s: %d blocks, sections of %d, %d states, a budget of %d\n", what,
               static_cast<int>(plan.blocks), static_cast<int>(plan.section),
               static_cast<int>(plan.States()), static_cast<int>(budget));
  ++failures;
}

void Check(int64_t blocks, bool with_reversed, bool whole_steps) {
  FarPlan least = PlanFarStates(blocks, with_reversed, whole_steps, 0);
  int64_t root = 1;
  while (root * root < blocks) ++root;
  Expect(least.States() <= (with_reversed ? 4 : 3) * root + 24, "too many", least, 0);
  const int64_t all = performer::RoundUp(blocks > 0 ? blocks : 1, kFarGroup);
  for (int64_t budget = 0; budget < 3 * blocks + 60; budget += 1 + budget / 7) {
    const FarPlan plan = PlanFarStates(blocks, with_reversed, whole_steps, budget);
    Expect(plan.section % kFarGroup == 0 && plan.section >= kFarGroup && plan.section <= all,
           "not a section", plan, budget);
    Expect(plan.section % plan.step == 0, "not whole steps", plan, budget);
    Expect(plan.States() <= budget || plan.States() == least.States(), "beyond the budget", plan,
           budget);
    FarPlan longer = plan;
    longer.section += kFarGroup;
    if (whole_steps) longer.step = longer.section;
    Expect(longer.section > all || longer.States() > budget, "could be longer", plan, budget);
  }
}

}  // namespace

int main() {
  for (const int64_t blocks :
       std::initializer_list<int64_t>{0, 1, 4, 5, 16, 63, 64, 65, 1000, 2048})
    for (const bool with_reversed : {false, true})
      for (const bool whole_steps : {false, true}) Check(blocks, with_reversed, whole_steps);
  // The sequence of the goals: 64 blocks, whose states take four times the size of the values, and
  // one sequence alone. A third of the budget is left to other scratch memory.
  const int64_t values = 16;  // states that take as much memory as the values
  if (PlanFarStates(64, false, false, 0).States() > 2 * values * 2 / 3 + 2) ++failures;
  return failures;
}
