// The GPUs of this machine, for reports and messages.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/status.h"

namespace performer {
namespace cuda {

struct DeviceInfo {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int64_t memory = 0;        // bytes
  int multiprocessors = 0;
};

// Lists the devices in CUDA's order. Errors as ToStatus: without a driver or a device,
// FailedPrecondition.
Status ListDevices(std::vector<DeviceInfo>* devices);

}  // namespace cuda
}  // namespace performer
