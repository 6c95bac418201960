// The operators on an NVIDIA GPU (sm_80 and later), TensorFlow-free. The counterpart of cpu/run.h.
#pragma once
#include <cstddef>
#include <functional>

#include "core/params.h"
#include "core/status.h"

namespace performer {
namespace cuda {

// What a call needs from its host.
struct Device {
  void* stream = nullptr;  // CUstream_st*; all work of the call is put on it, in order

  // `bytes` > 0 of device memory aligned to 256, which stay allocated until the stream has passed
  // the call; nullptr: there is none left.
  std::function<void*(size_t bytes)> allocate;
};

// Largest D and E of the kernels. Any M, L, S, B, H and G are taken.
inline constexpr int64_t kMaxHeadWidth = 128;

// Whether Run takes such a call: OK, or InvalidArgument that names the rule and the value.
// Depends on nothing but the arguments; there need be no GPU.
Status Supports(Op op, DType dtype, const Dims& dims);

// Enqueues one operator on the current device's stream and returns without waiting for it. The
// shapes of the call have been accepted by InferShapes, its offsets by ValidateOffsets.
//
// All pointers of the call are device pointers, aligned to their element, except that of the input
// "offsets" where attributes.packed is set: that one is a host pointer, read before Run returns
// (the lengths decide how the work is divided).
//
// Every output is written. Results are the same bits for any batch size, number of heads, GPU of
// one architecture, and run. Errors: InvalidArgument as Supports; ResourceExhausted if `allocate`
// gives nothing; Internal with CUDA's own text (driver too old, no kernel image, launch failure).
Status Run(Op op, const Call& call, const Device& device);

}  // namespace cuda
}  // namespace performer
