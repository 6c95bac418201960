// How a program says that an input has another number of sequences than the offsets, which only the
// running program may know: by a mark in place of the first offset. The lowering writes it, the
// handlers read it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "core/params.h"

namespace performer {

// No sum of rows comes near the marks.
constexpr int64_t MarkOfOtherCount(size_t input) {
  return INT64_MIN + 1 + static_cast<int64_t>(input);
}

// `status`, the outcome of the check of call.offsets; or, where they hold a mark, what it means.
inline Status ExplainOtherCount(Op op, const Call& call, const Status& status) {
  if (status.ok() || call.offsets.empty()) return status;
  const auto& inputs = SignatureOf(op).inputs;
  for (size_t i = 0; i < inputs.size(); ++i)
    if (call.offsets[0] == MarkOfOtherCount(i))
      return Status::InvalidArgument(
          std::string(inputs[i].name) + " must have as many sequences as offsets" +
          (inputs[i].shape[0] == 'P' ? ", or one, and both parts of a state as many," : "") +
          " when the XLA program runs");
  return status;
}

}  // namespace performer
