#include "cuda/errors.h"

#include <cuda_runtime_api.h>

namespace performer {
namespace cuda {
namespace {

// "13.0" of 13000.
std::string Version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

std::string DriverVersion() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0) return "there is none";
  return "the one here is for CUDA " + Version(version);
}

}  // namespace

Status ToStatus(int error, const char* what) {
  if (error == cudaSuccess) return Status();
  const auto code = static_cast<cudaError_t>(error);
  const std::string text = std::string("CUDA: ") + what + ": " + cudaGetErrorString(code) + " (" +
                           cudaGetErrorName(code) + ")";
  switch (code) {
    case cudaErrorInsufficientDriver:
      return Status::FailedPrecondition(
          text + ". Performer's GPU kernels are built with CUDA " + Version(CUDART_VERSION) +
          " and need a driver for it or a later one; " + DriverVersion() + ".");
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return Status::FailedPrecondition(
          text +
          ". Performer's GPU kernels run on GPUs of compute capability 8.0 and later; rebuild them "
          "for this one if it is newer than the build "
          "(CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=...).");
    case cudaErrorNoDevice:
      return Status::FailedPrecondition(text);
    case cudaErrorMemoryAllocation:
      return Status::ResourceExhausted(text);
    default:
      return Status::Internal(text);
  }
}

}  // namespace cuda
}  // namespace performer
