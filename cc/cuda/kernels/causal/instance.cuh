// Causal of one type, PERFORMER_TYPE.
#include "cuda/host/operators.h"
#include "cuda/kernels/causal/launch.cuh"

namespace performer {
namespace cuda {

template <>
Status RunCausal<PERFORMER_TYPE>(const performer::CausalParams& params, const Device& device) {
  if (IsNarrow(params.dims)) return Causal<PERFORMER_TYPE, kNarrow>(params, device).Run(params);
  return Causal<PERFORMER_TYPE, kWide>(params, device).Run(params);
}

}  // namespace cuda
}  // namespace performer
