// Parameters of the kernels: plain pointers and sizes, valid only after InferShapes has accepted
// the shapes.
//
// Tensors are contiguous. q, k, v, out and their gradients have type `dtype`; everything else
// (projections, biases, state and gradients of these) has the state type: float64 where dtype is
// kFloat64, else float32. Letters as in schema.h.
#pragma once
#include <cstdint>

#include "core/attributes.h"
#include "core/schema.h"

namespace performer {

struct Common {
  DType dtype = DType::kFloat32;
  Attributes attributes;
  Dims dims;
  const int64_t* offsets =
      nullptr;  // [N + 1] rows of the packed sequences; nullptr: sequence n is batch row n
};

struct QuerySide {
  const void* query = nullptr;         // [B, L, H, D]
  const void* projection = nullptr;    // [projection_heads, M, D]
  int64_t projection_heads = 0;        // 1, G or H
  const void* feature_bias = nullptr;  // [feature_bias_heads, M]
  int64_t feature_bias_heads = 0;      // 1, G or H
};

struct KeySide {
  const void* key = nullptr;         // [B, S, G, D]
  const void* value = nullptr;       // [B, S, G, E]
  const void* projection = nullptr;  // [projection_heads, M, D]
  int64_t projection_heads = 0;      // 1 or G
  const void* bias = nullptr;        // [bias_batch, bias_heads, bias_length]; -inf masks a key
  int64_t bias_batch = 0, bias_heads = 0, bias_length = 0;  // each 1 or B, G, S
};

struct State {
  const void* log_mass = nullptr;  // [count, G, M], natural logarithms
  const void* mean = nullptr;      // [count, G, M, E]
  int64_t count = 0;               // N, or 1: the same for all sequences
};

struct MutableState {
  void* log_mass = nullptr;  // [N, G, M]
  void* mean = nullptr;      // [N, G, M, E]
};

struct QueryGradients {
  void* query = nullptr;         // [B, L, H, D]
  void* projection = nullptr;    // as QuerySide
  void* feature_bias = nullptr;  // as QuerySide
};

struct KeyGradients {
  void* key = nullptr;         // [B, S, G, D]
  void* value = nullptr;       // [B, S, G, E]
  void* projection = nullptr;  // as KeySide
  void* bias = nullptr;        // as KeySide
};

struct SummarizeParams : Common {
  KeySide keys;
  MutableState state;
};

struct ReadParams : Common {
  QuerySide queries;
  State state;
  void* out = nullptr;  // [B, L, H, E]
};

struct CausalParams : Common {
  QuerySide queries;
  KeySide keys;
  State initial;
  void* out = nullptr;  // [B, L, H, E]
  MutableState state;
};

struct SummarizeGradParams : Common {
  KeySide keys;
  State state, grad_state;
  KeyGradients grad_keys;
};

struct ReadGradParams : Common {
  QuerySide queries;
  State state;
  const void* grad_out = nullptr;  // [B, L, H, E]
  QueryGradients grad_queries;
  MutableState grad_state;
};

struct CausalGradParams : Common {
  QuerySide queries;
  KeySide keys;
  State initial;
  const void* grad_out = nullptr;  // [B, L, H, E]
  State grad_state;                // gradients of the final state
  QueryGradients grad_queries;
  KeyGradients grad_keys;
  MutableState grad_initial;  // [initial.count, G, M(, E)]
};

// Inputs and outputs in the order of the signature, as the params of one operator.
struct Call {
  DType dtype = DType::kFloat32;
  Attributes attributes;
  Dims dims;
  std::vector<Shape> input_shapes;
  std::vector<const void*> inputs;
  std::vector<void*> outputs;
};

// ValidateOffsets for the call's own offsets, in host memory. OK where sequences are not packed.
Status CheckOffsets(Op op, const Call& call);

SummarizeParams MakeSummarizeParams(const Call& call);
ReadParams MakeReadParams(const Call& call);
CausalParams MakeCausalParams(const Call& call);
SummarizeGradParams MakeSummarizeGradParams(const Call& call);
ReadGradParams MakeReadGradParams(const Call& call);
CausalGradParams MakeCausalGradParams(const Call& call);

}  // namespace performer
