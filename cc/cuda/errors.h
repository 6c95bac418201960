// Turns errors of the CUDA runtime into a Status, with CUDA's own text and, where the user can do
// something about it, advice.
#pragma once
#include "core/status.h"

namespace performer {
namespace cuda {

// `error` is a cudaError_t; `what` says what was being done. Returns OK for cudaSuccess,
// FailedPrecondition where there is no driver, device or code that could run, ResourceExhausted
// where memory is short, and Internal otherwise.
Status ToStatus(int error, const char* what);

}  // namespace cuda
}  // namespace performer
