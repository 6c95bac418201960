// Summarize and Read of one type, PERFORMER_TYPE.
#include "cuda/host/operators.h"
#include "cuda/kernels/forward/launch.cuh"

namespace performer {
namespace cuda {

template <>
Status RunSummarize<PERFORMER_TYPE>(const performer::SummarizeParams& params,
                                    const Device& device) {
  if (IsNarrow(params.dims))
    return Forward<PERFORMER_TYPE, kNarrow>(params, device).Summarize(params);
  return Forward<PERFORMER_TYPE, kWide>(params, device).Summarize(params);
}

template <>
Status RunRead<PERFORMER_TYPE>(const performer::ReadParams& params, const Device& device) {
  if (IsNarrow(params.dims)) return Forward<PERFORMER_TYPE, kNarrow>(params, device).Read(params);
  return Forward<PERFORMER_TYPE, kWide>(params, device).Read(params);
}

}  // namespace cuda
}  // namespace performer
