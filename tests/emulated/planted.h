// Runs one of the kernels of planted.cuh by name.
#pragma once
#include <string>

namespace performer {
namespace planted {

// x has 10 * threads numbers, out 4 * blocks * threads. False: no kernel of that name. Throws
// sim::Error.
bool Run(const std::string& name, bool bug, unsigned blocks, unsigned threads, const float* x,
         float* out);

}  // namespace planted
}  // namespace performer
