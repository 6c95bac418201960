#include "cuda/devices.h"

#include <cuda_runtime_api.h>

#include "cuda/errors.h"

namespace performer {
namespace cuda {

Status ListDevices(std::vector<DeviceInfo>* devices) {
  devices->clear();
  int count = 0;
  PERFORMER_RETURN_IF_ERROR(ToStatus(cudaGetDeviceCount(&count), "counting devices"));
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    PERFORMER_RETURN_IF_ERROR(
        ToStatus(cudaGetDeviceProperties(&properties, i), "asking for a device's properties"));
    devices->push_back({properties.name, properties.major, properties.minor,
                        static_cast<int64_t>(properties.totalGlobalMem),
                        properties.multiProcessorCount});
  }
  return Status();
}

Status CopyToHost(const void* device, size_t bytes, void* stream, void* host) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  PERFORMER_RETURN_IF_ERROR(
      ToStatus(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, cuda_stream),
               "copying to the host"));
  return ToStatus(cudaStreamSynchronize(cuda_stream), "waiting for a copy to the host");
}

}  // namespace cuda
}  // namespace performer
