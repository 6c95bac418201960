// The operators by type and width: run.cu chooses, the files NAME_TYPE.cu define one type each, so
// that they compile side by side.
#pragma once
#include "core/params.h"
#include "core/status.h"
#include "cuda/device/ptx.h"
#include "cuda/run.h"

namespace performer {
namespace cuda {

// Rows of tiles: D and E are padded to it.
inline constexpr int64_t kNarrow = 64, kWide = 128;
static_assert(kWide == kMaxHeadWidth);

template <class T>
Status RunSummarize(const performer::SummarizeParams& params, const Device& device);
template <class T>
Status RunRead(const performer::ReadParams& params, const Device& device);
template <class T>
Status RunCausal(const performer::CausalParams& params, const Device& device);
template <class T>
Status RunSummarizeGrad(const performer::SummarizeGradParams& params, const Device& device);
template <class T>
Status RunReadGrad(const performer::ReadGradParams& params, const Device& device);
template <class T>
Status RunCausalGrad(const performer::CausalGradParams& params, const Device& device);

inline bool IsNarrow(const Dims& dims) {
  return dims.key_dim <= kNarrow && dims.value_dim <= kNarrow;
}

}  // namespace cuda
}  // namespace performer
