#include "ptx/runtime.h"

#include "ptx/machine.h"

namespace performer {
namespace ptx {
namespace {

// As in the headers of CUDA, which may not be here: the library was perhaps compiled elsewhere.
using CudaError = int;
constexpr CudaError kSuccess = 0, kInvalidValue = 1, kInvalidDeviceFunction = 98,
                    kLaunchFailure = 719, kNotSupported = 801;
constexpr int kMaxDynamicSharedMemorySize = 8;     // cudaFuncAttribute
constexpr int kMaxSharedMemoryPerBlockOptin = 97;  // cudaDeviceAttr
constexpr int kVersion = 12000;
constexpr int kSharedBytesByDefault = 48 * 1024;

CudaError Refuse(CudaError error, const std::string& why) {
  TheRuntime().error = why;
  return error;
}

CudaError LaunchKernel(const void* entry, Size grid, Size block, void** arguments,
                       size_t shared_bytes) {
  Runtime& runtime = TheRuntime();
  const auto name = runtime.entries.find(entry);
  if (name == runtime.entries.end())
    return Refuse(kInvalidDeviceFunction, "a kernel is launched that was not registered");
  const auto kernel = runtime.program.find(name->second);
  if (kernel == runtime.program.end())
    return Refuse(kInvalidDeviceFunction, "no PTX is known of " + name->second);
  const auto given = runtime.shared_bytes.find(entry);
  const int most = given == runtime.shared_bytes.end() ? kSharedBytesByDefault : given->second;
  if (shared_bytes > static_cast<size_t>(most))
    return Refuse(kInvalidValue, "more shared memory than " + name->second + " may have");
  Launch launch;
  launch.kernel = &kernel->second;
  launch.grid = grid;
  launch.block = block;
  launch.shared_bytes = static_cast<uint32_t>(shared_bytes);
  launch.params = static_cast<const unsigned char*>(arguments[0]);
  ++runtime.launches[name->second];
  try {
    Run(launch);
  } catch (const Error& error) {
    return Refuse(kLaunchFailure, error.what());
  }
  return kSuccess;
}

}  // namespace

Runtime& TheRuntime() {
  static Runtime runtime;
  return runtime;
}

extern "C" {

// ---- What nvcc lets host code call

void** __cudaRegisterFatBinary(void* /*binary*/) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void** /*handle*/) {}
void __cudaUnregisterFatBinary(void** /*handle*/) {}
void __cudaRegisterFunction(void** /*handle*/, const char* entry, char* /*function*/,
                            const char* name, int /*threads*/, void*, void*, void*, void*, int*) {
  TheRuntime().entries[entry] = name;
}
// Host functions of kernels call these; kernels are launched by cudaLaunchKernel alone.
CudaError __cudaGetKernel(void*, const void*) { return kNotSupported; }
CudaError __cudaPopCallConfiguration(void*, void*, size_t*, void*) { return kNotSupported; }
CudaError __cudaLaunchKernel(void*, Size, Size, void**, size_t, void*) { return kNotSupported; }

// ---- The runtime's own functions

CudaError cudaLaunchKernel(const void* entry, Size grid, Size block, void** arguments,
                           size_t shared_bytes, void* /*stream*/) {
  return LaunchKernel(entry, grid, block, arguments, shared_bytes);
}
CudaError cudaFuncSetAttribute(const void* entry, int attribute, int value) {
  if (attribute != kMaxDynamicSharedMemorySize) return kSuccess;
  if (value > TheRuntime().max_shared_bytes) return kInvalidValue;
  TheRuntime().shared_bytes[entry] = value;
  return kSuccess;
}
CudaError cudaDeviceGetAttribute(int* value, int attribute, int /*device*/) {
  if (attribute != kMaxSharedMemoryPerBlockOptin) return kInvalidValue;
  *value = TheRuntime().max_shared_bytes;
  return kSuccess;
}
CudaError cudaGetDevice(int* device) {
  *device = 0;
  return kSuccess;
}
CudaError cudaGetLastError() { return kSuccess; }
CudaError cudaDriverGetVersion(int* version) {
  *version = kVersion;
  return kSuccess;
}
const char* cudaGetErrorString(CudaError) { return TheRuntime().error.c_str(); }
const char* cudaGetErrorName(CudaError) { return "of the interpreter"; }

}  // extern "C"

}  // namespace ptx
}  // namespace performer
