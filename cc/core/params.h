// The parameters of the kernels: plain pointers and sizes, valid only after InferShapes has
// accepted the shapes.
//
// Tensors are contiguous. Queries, keys, values, outputs and their gradients have type `dtype`.
// Everything else (projections, biases, the state and the gradients of these) has the state type:
// float64 where dtype is kFloat64, else float32. The letters of the shapes are those of schema.h.
#pragma once
#include <cstdint>
#include <vector>

#include "core/attributes.h"
#include "core/op.h"
#include "core/schema.h"

namespace performer {

struct Common {
  DType dtype = DType::kFloat32;
  Attributes attributes;
  Dims dims;
  // [N + 1]: packed sequence n has the rows offsets[n] to offsets[n + 1]. Where nullptr, sequence n
  // is batch row n.
  const int64_t* offsets = nullptr;
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
  const void* log_mass = nullptr;  // [count, G, M], in nats
  const void* mean = nullptr;      // [count, G, M, E]
  int64_t count = 0;               // N, or 1 where all sequences share the state
};

struct MutableState {
  void* log_mass = nullptr;  // [N, G, M]
  void* mean = nullptr;      // [N, G, M, E]
};

struct QueryGradients {
  void* query = nullptr;         // [B, L, H, D]
  void* projection = nullptr;    // as in QuerySide
  void* feature_bias = nullptr;  // as in QuerySide
};

struct KeyGradients {
  void* key = nullptr;         // [B, S, G, D]
  void* value = nullptr;       // [B, S, G, E]
  void* projection = nullptr;  // as in KeySide
  void* bias = nullptr;        // as in KeySide
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

struct NearFarParams : Common {
  QuerySide queries;
  KeySide keys;
  State initial;
  int64_t start = 0;           // the position of the first key row of each sequence
  void* out = nullptr;         // [B, L, H, E]
  void* log_weight = nullptr;  // [B, L, H], in nats
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
  State grad_state;                // of the final state
  QueryGradients grad_queries;
  KeyGradients grad_keys;
  MutableState grad_initial;  // [initial.count, G, M(, E)]
};

struct NearFarGradParams : Common {
  QuerySide queries;
  KeySide keys;
  State initial;
  int64_t start = 0;
  const void* log_weight = nullptr;       // [B, L, H]
  const void* grad_out = nullptr;         // [B, L, H, E]
  const void* grad_log_weight = nullptr;  // [B, L, H]
  State grad_state;                       // of the final state
  QueryGradients grad_queries;
  KeyGradients grad_keys;
  MutableState grad_initial;  // [initial.count, G, M(, E)]
};

// One call of an operator: inputs and outputs in the order of its signature.
struct Call {
  DType dtype = DType::kFloat32;
  Attributes attributes;
  Dims dims;
  std::vector<Shape> input_shapes;
  std::vector<const void*> inputs;
  std::vector<void*> outputs;
  // [N + 1], where sequences are packed: a checked copy in host memory. Only this is used, so that
  // no thread can change the offsets between the check and their use.
  std::vector<int64_t> offsets;
  int64_t start = 0;  // of near-and-far attention, likewise
};

// Applies ValidateOffsets to call.offsets. OK where sequences are not packed.
Status CheckOffsets(Op op, const Call& call);

// Copies the inputs "offsets" and "start", which lie in host memory, to call->offsets and
// call->start, and checks the copies.
Status TakeOffsets(Op op, Call* call);

// SummarizeParams MakeSummarizeParams(const Call& call), and likewise for each operator.
#define PERFORMER_DECLARE_MAKE_PARAMS(op) op##Params Make##op##Params(const Call& call);
PERFORMER_FOR_EACH_OP(PERFORMER_DECLARE_MAKE_PARAMS)
#undef PERFORMER_DECLARE_MAKE_PARAMS

}  // namespace performer
