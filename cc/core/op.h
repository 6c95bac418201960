// The eight operators. Whatever is written once for each of them is expanded from these lists.
#pragma once
#include <array>

// X(name) for each operator: X(Summarize), ..., in the order of the signatures.
#define PERFORMER_FOR_EACH_OP(X) \
  X(Summarize)                   \
  X(Read) X(Causal) X(NearFar) X(SummarizeGrad) X(ReadGrad) X(CausalGrad) X(NearFarGrad)

namespace performer {

#define PERFORMER_OP(name) k##name,
enum class Op { PERFORMER_FOR_EACH_OP(PERFORMER_OP) };
#undef PERFORMER_OP

#define PERFORMER_OP(name) Op::k##name,
inline constexpr std::array kAllOps = {PERFORMER_FOR_EACH_OP(PERFORMER_OP)};
#undef PERFORMER_OP

// Whether an operator has keys as inputs; the others read a state.
constexpr bool HasKeys(Op op) { return op != Op::kRead && op != Op::kReadGrad; }

// Whether an operator is the gradient of another one.
constexpr bool IsGrad(Op op) { return op >= Op::kSummarizeGrad; }

// Whether an operator attends to near keys exactly and to far keys by features.
constexpr bool IsNearFar(Op op) { return op == Op::kNearFar || op == Op::kNearFarGrad; }

}  // namespace performer
