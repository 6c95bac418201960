// The six operators. Whatever is written once for each of them is expanded from this list.
#pragma once
#include <array>

// X(name) for each operator: X(Summarize), ..., in the order of the signatures.
#define PERFORMER_FOR_EACH_OP(X) \
  X(Summarize) X(Read) X(Causal) X(SummarizeGrad) X(ReadGrad) X(CausalGrad)

namespace performer {

enum class Op { kSummarize, kRead, kCausal, kSummarizeGrad, kReadGrad, kCausalGrad };

#define PERFORMER_OP(name) Op::k##name,
inline constexpr std::array<Op, 6> kAllOps = {PERFORMER_FOR_EACH_OP(PERFORMER_OP)};
#undef PERFORMER_OP

// Whether an operator has keys as inputs; the others read a state.
constexpr bool HasKeys(Op op) { return op != Op::kRead && op != Op::kReadGrad; }

}  // namespace performer
