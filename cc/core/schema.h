// The arguments of each operator, the shapes that they must have, and the check of both.
//
// Shapes are written with letters: B batch, H query heads, G key/value heads, L queries, S keys,
// D key dimension, E value dimension, M features, N sequences, P initial states, which is 1 or N.
// Dimensions with one letter are equal. "1|G" is a broadcast dimension. The same check serves shape
// inference (where dimensions may be unknown), the op kernels and the NumPy bindings, so that a wrong
// argument gets the same message everywhere.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/attributes.h"
#include "core/op.h"
#include "core/shape.h"
#include "core/status.h"

namespace performer {

enum class ArgumentType {
  kTensor,   // T: float32, bfloat16, half or float64
  kState,    // float32, or float64 where T is float64
  kOffsets,  // int64
  kStart,    // int64
};

// "T", "U" or "int64": the type in the registration of the TensorFlow op.
inline const char* NameOf(ArgumentType type) {
  return type == ArgumentType::kTensor ? "T" : type == ArgumentType::kState ? "U" : "int64";
}

struct Argument {
  const char* name;
  ArgumentType type;
  const char* shape;  // letters separated by spaces, or "=name": the shape of that input
};

struct Signature {
  const char* name;  // of the TensorFlow op
  std::vector<Argument> inputs, outputs;
};

const Signature& SignatureOf(Op op);

// The position of "offsets" among an operator's inputs. Every operator has it.
size_t OffsetsIndex(Op op);

// The sizes of one call: B, H, G, L, S, D, E, M and N. A size is kUnknown where it is not known,
// and 0 where the operator has no such letter.
struct Dims {
  int64_t batch = 0, heads = 0, groups = 0, queries = 0, keys = 0, key_dim = 0, value_dim = 0,
          features = 0, sequences = 0;
};

// The largest D, E and M, and the largest H and G. With kMaxElements (shape.h), the largest tensor,
// they keep every size of the CPU drivers within int64: these multiply the elements of a tensor by
// 32 bytes at most (work_division.h), and M (D + E) by heads and splits. cuda::Supports has narrower
// ones.
inline constexpr int64_t kMaxWidth = 65536;
inline constexpr int64_t kMaxHeads = 1 << 20;

// Checks the input shapes and returns the sizes and the output shapes. inputs.size() must be that
// of the signature. Errors are InvalidArgument and name the argument, the rule and the value.
Status InferShapes(Op op, const Attributes& attributes, const std::vector<Shape>& inputs,
                   Dims* dims, std::vector<Shape>* outputs);

// The position of the first key row must be at least 0, and 0 where sequences are packed.
Status ValidateStart(int64_t start, bool packed);

// The offsets [count + 1] of packed sequences must start at 0, never fall and end at `rows`.
Status ValidateOffsets(const int64_t* offsets, int64_t count, int64_t rows);

}  // namespace performer
