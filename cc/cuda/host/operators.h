// The operators by type. run.cu chooses among them; each file instantiations/NAME_TYPE.cu defines
// those of one kernel family and type, so that they compile in parallel.
#pragma once
#include "core/params.h"
#include "core/status.h"
#include "cuda/run.h"

namespace performer {
namespace cuda {

template <class T>
Status RunSummarize(const performer::SummarizeParams& call, const Device& device);
template <class T>
Status RunRead(const performer::ReadParams& call, const Device& device);
template <class T>
Status RunCausal(const performer::CausalParams& call, const Device& device);
template <class T>
Status RunSummarizeGrad(const performer::SummarizeGradParams& call, const Device& device);
template <class T>
Status RunReadGrad(const performer::ReadGradParams& call, const Device& device);
template <class T>
Status RunCausalGrad(const performer::CausalGradParams& call, const Device& device);

}  // namespace cuda
}  // namespace performer
