// The gradient of Causal of one type, PERFORMER_TYPE.
#include "cuda/kernels/causal_backward/launch.cuh"

namespace performer {
namespace cuda {

template Status RunCausalGrad<PERFORMER_TYPE>(const performer::CausalGradParams&, const Device&);

}  // namespace cuda
}  // namespace performer
