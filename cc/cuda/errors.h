// Errors of the CUDA runtime as a status with CUDA's own text and, where the user can do something
// about it, what.
#pragma once
#include "core/status.h"

namespace performer {
namespace cuda {

// `error` is a cudaError_t, `what` was being done. OK for cudaSuccess. FailedPrecondition: there is
// no driver, device or code that could run; ResourceExhausted: no memory; else Internal.
Status ToStatus(int error, const char* what);

}  // namespace cuda
}  // namespace performer
