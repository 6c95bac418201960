// The operators on an NVIDIA GPU (sm_80 and later), without TensorFlow. The counterpart of
// cpu/run.h.
#pragma once
#include <cstddef>
#include <functional>

#include "core/params.h"
#include "core/shared.h"
#include "core/status.h"

namespace performer {
namespace cuda {

// The alignment of workspace in bytes: kernels copy as many at a time (cp.async, uint4). XLA's
// allocator guarantees no more.
inline constexpr size_t kWorkspaceAlignment = 16;

// What a call needs from its host.
struct Device {
  void* stream = nullptr;  // CUstream_st*; all work of the call is enqueued on it, in order

  // Returns `bytes` > 0 of device memory, aligned to kWorkspaceAlignment, which stay allocated
  // until the stream has completed the call; or nullptr, if there is no memory left.
  std::function<void*(size_t bytes)> allocate;

  // The most shared memory that a block may have, in bytes; 0: that of the current device.
  int shared_bytes = 0;
};

// The largest D and E that the kernels take, in 16 bits and in float32, whose tiles are twice as
// large; the largest H and G, which are a dimension of grids.
inline constexpr int64_t kMaxHeadWidth = 256;
inline constexpr int64_t kMaxFloat32HeadWidth = 128;
inline constexpr int64_t kMaxHeads = 65535;

// The most rows of all heads, B L H and B S G, and the most sequences of all heads, N H. They keep
// every size of workspace within int64: the largest, partial gradients, has M E floats for each
// split of each head, and at most one split for each row or sequence.
inline constexpr int64_t kMaxRows = int64_t{1} << 36;

// Whether the kernels take such a call: OK, or InvalidArgument that names the rule and the value.
// The answer depends only on the arguments; no GPU is needed. Any M is accepted.
PERFORMER_SHARED Status Supports(DType dtype, const Dims& dims);

// Enqueues one operator on the current device's stream and returns without waiting for it. The
// shapes of the call have been accepted by InferShapes, its offsets by CheckOffsets.
//
// All pointers of the call are device pointers, aligned to their element. The input "offsets" is
// not read: call.offsets decides how the work is divided, and may be freed when Run returns.
//
// Every output is written. Results have the same bits for any batch size and number of heads, in
// every run, and on every GPU of one architecture. Errors:
//   InvalidArgument     as Supports, and where a grid would have 2^31 blocks or more along the rows
//   ResourceExhausted   if `allocate` returns nullptr
//   FailedPrecondition  no device, a driver that is too old, no code for this GPU; or a block needs
//                       more shared memory than the GPU has (D or E above 64, on a GPU with less
//                       than 163 KiB)
//   Internal            a launch failed
// Errors of the CUDA runtime carry its own text (errors.h).
PERFORMER_SHARED Status Run(Op op, const Call& call, const Device& device);

}  // namespace cuda
}  // namespace performer
