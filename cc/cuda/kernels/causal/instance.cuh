// Causal of one type, PERFORMER_TYPE.
#include "cuda/kernels/causal/launch.cuh"

namespace performer {
namespace cuda {

template Status RunCausal<PERFORMER_TYPE>(const performer::CausalParams&, const Device&);

}  // namespace cuda
}  // namespace performer
