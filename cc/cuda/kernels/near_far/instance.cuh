// NearFar of one type, PERFORMER_TYPE.
#include "cuda/kernels/near_far/launch.cuh"

namespace performer {
namespace cuda {

template Status RunNearFar<PERFORMER_TYPE>(const performer::NearFarParams&, const Device&);

}  // namespace cuda
}  // namespace performer
