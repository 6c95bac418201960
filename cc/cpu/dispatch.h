// Chooses among the compiled instruction sets.
#pragma once
#include <string>

#include "core/status.h"
#include "cpu/kernels/kernels.h"

namespace performer {
namespace cpu {

// The kernels of `isa`; "" means the instruction set in force (run.h).
Status FindKernels(const std::string& isa, const Kernels<float>** kernels);
Status FindKernels(const std::string& isa, const Kernels<double>** kernels);

}  // namespace cpu
}  // namespace performer
