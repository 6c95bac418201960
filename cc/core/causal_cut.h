// Where causal attention cuts a chunk of keys into sub-chunks, on the CPU and on GPUs.
//
// The weights of a sub-chunk's keys are relative to a reference for each feature, which comes from
// the state before it and from its first key. So no later key changes a bit of an earlier row. A
// later key whose log-feature exceeds the reference by more than the limit below begins the next
// sub-chunk, or its weight could overflow. Such keys are rare.
#pragma once

namespace performer {

// In nats. exp(30) times the keys of a chunk leaves room for values up to 1e24 in bfloat16 and
// float32.
inline constexpr float kCausalCutNats = 30.f;
// Where weights are stored as half, which ends at 65504.
inline constexpr float kCausalCutNatsOfHalf = 10.f;
// kCausalCutNats in whole bits, for log-features in base 2.
inline constexpr int kCausalCutBits = static_cast<int>(kCausalCutNats * 1.44269504f);
static_assert(kCausalCutBits == 43);

}  // namespace performer
