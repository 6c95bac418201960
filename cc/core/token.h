// One token of a stream: the state after it may take the memory of that before it.
#pragma once
#include <string>
#include <vector>

#include "core/schema.h"

namespace performer {

// Whether a call is one token of each sequence. The CPU kernels of such a call read every number of
// the initial state before they write its place in the final one, so that both may be one buffer.
inline bool IsToken(Op op, const Attributes& attributes, const Dims& dims) {
  if (attributes.packed) return false;
  return op == Op::kCausal ? dims.keys == 1
                           : op == Op::kNearFar && attributes.causal && dims.queries == 1;
}

// The input with the initial state of `output`, if it has as many sequences; -1 for none.
inline int InitialStateOf(Op op, const std::string& output, const Dims& dims,
                          const std::vector<Shape>& input_shapes) {
  const std::vector<Argument>& inputs = SignatureOf(op).inputs;
  for (size_t i = 0; i < inputs.size(); ++i)
    if (inputs[i].name == "initial_" + output && input_shapes[i].dims[0] == dims.sequences)
      return static_cast<int>(i);
  return -1;
}

}  // namespace performer
