// Stands in for the race detector and the counter of traffic in builds without them.
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
void TrafficLaunchBegins(const char*) {}
void TrafficBlockBegins() {}
void TrafficAccess(const void*, size_t, bool) {}
void CountTraffic(const void*, size_t) {}
void CountNoTraffic() {}
bool DetectsRaces() { return false; }

}  // namespace sim
}  // namespace performer
