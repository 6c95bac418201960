// Runs one of the kernels of probes.cuh by name, on numbers of the host.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/status.h"

namespace performer {
namespace probes {

std::vector<std::string> Names();

// Whose tensor cores the emulator has: "H100" or "A100"; on a GPU, its own whatever this says.
Status SetTensorCores(const std::string& name);

// `in` holds warps * 32 * kIn words, *out receives warps * 32 * kOut. Waits for the result.
Status Run(const std::string& name, int64_t warps, const uint32_t* in, std::vector<uint32_t>* out);

// What single instructions reach on this GPU (ceilings.cu); nothing on the emulator.
Status Ceilings(std::map<std::string, double>* rates);

extern const bool kEmulated;

}  // namespace probes
}  // namespace performer
