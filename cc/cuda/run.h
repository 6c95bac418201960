// The operators on an NVIDIA GPU (sm_80 and later), TensorFlow-free. The counterpart of cpu/run.h.
#pragma once
#include <cstddef>
#include <functional>

#include "core/params.h"
#include "core/status.h"

namespace performer {
namespace cuda {

// Bytes to which workspace has to be aligned: kernels copy so many at a time (cp.async, uint4). It
// is also all that XLA's allocator can be asked for.
inline constexpr size_t kWorkspaceAlignment = 16;

// What a call needs from its host.
struct Device {
  void* stream = nullptr;  // CUstream_st*; all work of the call is put on it, in order

  // `bytes` > 0 of device memory aligned to kWorkspaceAlignment, which stay allocated until the
  // stream has passed the call; nullptr: there is none left.
  std::function<void*(size_t bytes)> allocate;

  // The most shared memory that a block may have, in bytes; 0: what the current device has.
  int shared_bytes = 0;
};

// Largest D and E of the kernels; largest H and G, which are a dimension of their grids.
inline constexpr int64_t kMaxHeadWidth = 128;
inline constexpr int64_t kMaxHeads = 65535;

// Whether the kernels take such a call: OK, or InvalidArgument that names the rule and the value.
// Depends on nothing but the arguments; there need be no GPU. Any M, L, S and B pass.
Status Supports(Op op, DType dtype, const Dims& dims);

// Enqueues one operator on the current device's stream and returns without waiting for it. The
// shapes of the call have been accepted by InferShapes, its offsets by ValidateOffsets.
//
// All pointers of the call are device pointers, aligned to their element, except that of the input
// "offsets" where attributes.packed is set: that one is a host pointer, read before Run returns
// (the lengths decide how the work is divided).
//
// Every output is written. Results are the same bits for any batch size, number of heads, GPU of
// one architecture, and run. Errors: InvalidArgument as Supports, and where a grid would have 2^31
// blocks or more along the rows; ResourceExhausted if `allocate` gives nothing; as ToStatus
// (errors.h) with CUDA's own text: FailedPrecondition (no device, driver too old, no code for this
// GPU), Internal (launch failure); FailedPrecondition where a block would need more shared memory
// than the GPU has (D or E above 64, on one with less than 163 KiB).
Status Run(Op op, const Call& call, const Device& device);

}  // namespace cuda
}  // namespace performer
