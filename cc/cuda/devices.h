// The GPUs of this machine, for reports and messages; and copies of their memory to the host.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/shared.h"
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
PERFORMER_SHARED Status ListDevices(std::vector<DeviceInfo>* devices);

// Copies `bytes` of device memory to the host and waits for the stream. Errors as ToStatus.
PERFORMER_SHARED Status CopyToHost(const void* device, size_t bytes, void* stream, void* host);

}  // namespace cuda
}  // namespace performer
