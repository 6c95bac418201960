// What the host does with the device: workspace, copies and launches, with errors as a Status. The
// same code drives a GPU (nvcc) and the emulator.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#if defined(__CUDACC__)
#include <map>
#include <mutex>
#include <utility>
#endif

#include "cuda/device/kernel_params.cuh"
#include "cuda/errors.h"
#include "cuda/kernels/store_numbers.cuh"
#include "cuda/run.h"

namespace performer {
namespace cuda {

// The number of blocks of a launch. int64, because a call may need more than a grid can have.
struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

inline Status OutOfMemory(int64_t bytes, const char* purpose) {
  return Status::ResourceExhausted("out of GPU memory: " + std::to_string(bytes) + " bytes for " +
                                   purpose);
}

#if defined(__CUDACC__)
// Reports an error and clears it in the runtime, where the next call of other code would find it.
inline Status TakeError(cudaError_t error, const char* what) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return ToStatus(error, what);
}

// (Defined to measure what the other way costs: tests/gpu/run.py.)
#if defined(PERFORMER_DEFAULT_CARVEOUT)
inline constexpr int kCarveout = cudaSharedmemCarveoutDefault;
#else
inline constexpr int kCarveout = cudaSharedmemCarveoutMaxShared;
#endif

// What a kernel with dynamic shared memory needs, once for each device: the permission to use more
// than 48 KiB, and a multiprocessor whose memory is shared memory as far as possible, so that it
// holds as many blocks as fit.
inline Status PrepareKernel(const void* entry, int shared_bytes, const char* name) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int> prepared;  // bytes by device and kernel
  int device = 0;
  PERFORMER_RETURN_IF_ERROR(TakeError(cudaGetDevice(&device), name));
  const std::lock_guard<std::mutex> lock(mutex);
  int& bytes = prepared[{device, entry}];
  if (bytes >= shared_bytes) return Status();
  for (const auto& [attribute, value] :
       {std::pair(cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        std::pair(cudaFuncAttributePreferredSharedMemoryCarveout, kCarveout)})
    PERFORMER_RETURN_IF_ERROR(TakeError(cudaFuncSetAttribute(entry, attribute, value), name));
  bytes = shared_bytes;
  return Status();
}
#endif

// The most shared memory that a block may have. Where the device does not answer, a launch will
// fail too and report the cause.
inline int SharedBytesPerBlock(const Device& device) {
  if (device.shared_bytes != 0) return device.shared_bytes;
#if defined(__CUDACC__)
  int number = 0, bytes = 0;
  if (cudaGetDevice(&number) == cudaSuccess &&
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, number) ==
          cudaSuccess)
    return bytes;
  (void)cudaGetLastError();
#endif
  return kMaxSharedBytes;
}

class Launcher {
 public:
  explicit Launcher(const Device& device)
      : device_(device), shared_bytes_(SharedBytesPerBlock(device)) {}

  // Whether blocks have less shared memory than on sm_80: they are then sized for
  // kSmallSharedBytes.
  bool HasSmallBlocks() const { return shared_bytes_ < kMaxSharedBytes; }

  // Allocates workspace of `count` elements. `purpose` is for messages.
  template <class T>
  Status Allocate(int64_t count, const char* purpose, T** to) const {
    int64_t bytes;
    if (__builtin_mul_overflow(count, static_cast<int64_t>(sizeof(T)), &bytes))
      return OutOfMemory(INT64_MAX, purpose);
    *to = nullptr;
    if (count == 0) return Status();
    *to = static_cast<T*>(device_.allocate(static_cast<size_t>(bytes)));
    if (*to == nullptr) return OutOfMemory(bytes, purpose);
    const uintptr_t address = reinterpret_cast<uintptr_t>(*to);
    if (address % kWorkspaceAlignment != 0)
      return Status::Internal("GPU memory must be aligned to " +
                              std::to_string(kWorkspaceAlignment) + " bytes; the allocator gave " +
                              std::to_string(address) + " for " + purpose);
    return Status();
  }

  // Copies numbers of the host to workspace. `from` may be freed afterwards, also while a graph is
  // captured.
  Status Upload(const std::vector<int64_t>& from, const int64_t** to) const {
    int64_t* copy = nullptr;
    PERFORMER_RETURN_IF_ERROR(Allocate(static_cast<int64_t>(from.size()), "offsets", &copy));
    *to = copy;
    constexpr size_t kMost = StoreNumbersParams::kMaxCount;
    for (size_t first = 0; first < from.size(); first += kMost) {
      StoreNumbersParams p = {
          copy + first, static_cast<int>(std::min(kMost, from.size() - first)), {}};
      std::copy_n(from.data() + first, p.count, p.numbers);
      PERFORMER_RETURN_IF_ERROR(
          Launch("storing offsets", StoreNumbersKernel, {1}, static_cast<int>(kMost), 0, p));
    }
    return Status();
  }

  // Enqueues a kernel; nothing where the grid is empty. `name` is for messages.
  template <class Params>
  Status Launch(const char* name, void (*kernel)(Params), const Grid& grid, int threads,
                int shared_bytes, const Params& params) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return Status();
    PERFORMER_RETURN_IF_ERROR(CheckLaunch(name, grid, shared_bytes));
    const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                      static_cast<unsigned>(grid.z));
#if defined(__CUDACC__)
    const void* entry = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > 0) PERFORMER_RETURN_IF_ERROR(PrepareKernel(entry, shared_bytes, name));
    void* arguments[] = {const_cast<Params*>(&params)};
    return TakeError(
        cudaLaunchKernel(entry, blocks, dim3(threads), arguments, shared_bytes, Stream()), name);
#else
    try {
      sim::Enqueue(
          [=] { sim::Launch(name, blocks, dim3(threads), shared_bytes, [&] { kernel(params); }); });
    } catch (const sim::Error& error) {
      return Status::Internal(std::string("emulator: ") + name + ": " + error.what());
    }
    return Status();
#endif
  }

 private:
  Status CheckLaunch(const char* name, const Grid& grid, int shared_bytes) const {
    if (grid.x > INT32_MAX || grid.y > UINT16_MAX || grid.z > UINT16_MAX)
      return Status::InvalidArgument(
          std::string(name) +
          ": too large for one launch, at most 2147483647 tiles of rows, 65535 " +
          "heads and 65535 feature blocks; got " + std::to_string(grid.x) + ", " +
          std::to_string(grid.y) + " and " + std::to_string(grid.z));
    if (shared_bytes > shared_bytes_)
      return Status::FailedPrecondition(
          std::string(name) + ": heads of this width take " + std::to_string(shared_bytes) +
          " bytes of shared memory in a block; this GPU has " + std::to_string(shared_bytes_) +
          ". With D and E of at most 64 the kernels run on any GPU of compute capability 8.0 or "
          "later");
    return Status();
  }

#if defined(__CUDACC__)
  cudaStream_t Stream() const { return static_cast<cudaStream_t>(device_.stream); }
#endif

  const Device& device_;
  const int shared_bytes_;
};

}  // namespace cuda
}  // namespace performer
