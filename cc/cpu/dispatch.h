// Chooses among the compiled instruction sets.
#pragma once
#include <string>

#include "core/status.h"
#include "cpu/kernels/kernels.h"

namespace performer {
namespace cpu {

// The kernels of `isa`, or of the one in force if it is "" (see run.h).
Status FindKernels(const std::string& isa, const Kernels<float>** kernels);
Status FindKernels(const std::string& isa, const Kernels<double>** kernels);

}  // namespace cpu
}  // namespace performer
