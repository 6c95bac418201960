// Summarize and Read of one type, PERFORMER_TYPE.
#include "cuda/kernels/forward/launch.cuh"

namespace performer {
namespace cuda {

template Status RunSummarize<PERFORMER_TYPE>(const performer::SummarizeParams&, const Device&);
template Status RunRead<PERFORMER_TYPE>(const performer::ReadParams&, const Device&);

}  // namespace cuda
}  // namespace performer
