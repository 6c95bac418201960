// NearFarGrad of one type, PERFORMER_TYPE.
#include "cuda/kernels/near_far_backward/launch.cuh"

namespace performer {
namespace cuda {

template Status RunNearFarGrad<PERFORMER_TYPE>(const performer::NearFarGradParams&, const Device&);

}  // namespace cuda
}  // namespace performer
