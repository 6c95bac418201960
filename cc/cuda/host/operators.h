// The operators by type. run.cu chooses among them; each file instantiations/NAME_TYPE.cu defines
// those of one kernel family and type, so that they compile in parallel.
#pragma once
#include "core/op.h"
#include "core/params.h"
#include "core/status.h"
#include "cuda/run.h"

namespace performer {
namespace cuda {

#define PERFORMER_DECLARE_RUN(Name) \
  template <class T>                \
  Status Run##Name(const performer::Name##Params& call, const Device& device);
PERFORMER_FOR_EACH_OP(PERFORMER_DECLARE_RUN)
#undef PERFORMER_DECLARE_RUN

}  // namespace cuda
}  // namespace performer
