// Kernels are registered once in a process, however many copies of this library it loads.
#pragma once
#include "tensorflow/core/framework/kernel_def.pb.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace performer {

// Whether another copy of this library has registered its kernels for a device. A second kernel for
// the same operator, device and type would break every call ("Multiple OpKernel registrations"), so
// the copy that comes later registers none, and calls run those of the first.
inline bool IsRegistered(const char* device) {
  const auto kernels = tensorflow::GetRegisteredKernelsForOp("Performer>Summarize");
  for (const auto& kernel : kernels.kernel())
    if (kernel.device_type() == device) return true;
  return false;
}

}  // namespace performer
