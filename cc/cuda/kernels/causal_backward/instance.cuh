// Gradient of Causal of one type, PERFORMER_TYPE.
#include "cuda/host/operators.h"
#include "cuda/kernels/causal_backward/launch.cuh"

namespace performer {
namespace cuda {

template <>
Status RunCausalGrad<PERFORMER_TYPE>(const performer::CausalGradParams& params,
                                     const Device& device) {
  if (IsNarrow(params.dims)) return CausalGrad<PERFORMER_TYPE, kNarrow>(params, device).Run();
  return CausalGrad<PERFORMER_TYPE, kWide>(params, device).Run();
}

}  // namespace cuda
}  // namespace performer
