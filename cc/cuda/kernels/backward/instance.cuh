// Gradients of Summarize and Read of one type, PERFORMER_TYPE.
#include "cuda/host/operators.h"
#include "cuda/kernels/backward/launch.cuh"

namespace performer {
namespace cuda {

template <>
Status RunSummarizeGrad<PERFORMER_TYPE>(const performer::SummarizeGradParams& params,
                                        const Device& device) {
  if (IsNarrow(params.dims))
    return BidirectionalGrad<PERFORMER_TYPE, kNarrow>(params, device).Summarize(params);
  return BidirectionalGrad<PERFORMER_TYPE, kWide>(params, device).Summarize(params);
}

template <>
Status RunReadGrad<PERFORMER_TYPE>(const performer::ReadGradParams& params, const Device& device) {
  if (IsNarrow(params.dims))
    return BidirectionalGrad<PERFORMER_TYPE, kNarrow>(params, device).Read(params);
  return BidirectionalGrad<PERFORMER_TYPE, kWide>(params, device).Read(params);
}

}  // namespace cuda
}  // namespace performer
