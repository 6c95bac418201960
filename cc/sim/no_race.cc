// Stands in for the race detector in builds without it.
#include "sim/block.h"

namespace performer {
namespace sim {

void RaceBlockBegins(Block&) {}
void RaceBlockEnds() {}
void RaceLaunchEnds() {}
void RaceRelease(unsigned) {}
void RaceAcquire(unsigned) {}
void RaceAccess(const void*, size_t, bool, void*) {}
void Track(const void*, size_t) {}
void UntrackAll() {}
void ResetRaces() {}
bool DetectsRaces() { return false; }

}  // namespace sim
}  // namespace performer
