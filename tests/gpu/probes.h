// Runs one of the kernels of probes.cuh by name, on numbers of the host.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/status.h"

namespace performer {
namespace probes {

std::vector<std::string> Names();

// `in` holds warps * 32 * kIn words, *out receives warps * 32 * kOut. Waits for the result.
Status Run(const std::string& name, int64_t warps, const uint32_t* in, std::vector<uint32_t>* out);

extern const bool kEmulated;

}  // namespace probes
}  // namespace performer
