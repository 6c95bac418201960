// The custom calls that XLA programs hold for the operators: what the lowering (in _xla.so) writes
// and the handlers (in _ops.so) read. One target for each operator, called like it; operands and
// results are the operator's inputs and outputs in the order of its signature, row-major; these
// attributes:
#pragma once

namespace performer {

inline constexpr char kFeatureMapAttribute[] = "feature_map";          // string
inline constexpr char kScaleAttribute[] = "scale";                     // f64
inline constexpr char kKeyNormAttribute[] = "key_norm";                // bool
inline constexpr char kFeatureEpsilonAttribute[] = "feature_epsilon";  // f64
inline constexpr char kPackedAttribute[] = "packed";                   // bool

}  // namespace performer
