// The gradients of Summarize and Read of one type, PERFORMER_TYPE.
#include "cuda/kernels/backward/launch.cuh"

namespace performer {
namespace cuda {

template Status RunSummarizeGrad<PERFORMER_TYPE>(const performer::SummarizeGradParams&,
                                                 const Device&);
template Status RunReadGrad<PERFORMER_TYPE>(const performer::ReadGradParams&, const Device&);

}  // namespace cuda
}  // namespace performer
