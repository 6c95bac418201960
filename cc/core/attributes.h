// The attributes of the operators: their names, meanings and defaults.
#pragma once
#include <cstdint>
#include <string>

#include "core/op.h"
#include "core/status.h"

namespace performer {

enum class DType { kFloat32, kBFloat16, kHalf, kFloat64 };

// The positive feature map phi; the kernels work with its logarithm. With u = sqrt(scale) (w . x):
//   kSoftmax  log phi = u; for keys, if key_norm, u - scale |k|^2 / 2  FAVOR+, arXiv:2009.14794
//   kRelu     log phi = log(max(u, 0) + feature_epsilon)  generalised attention, arXiv:2009.14794
//   kElu      log phi = log(elu(u) + 1)                   arXiv:2006.16236
enum class FeatureMap { kSoftmax, kRelu, kElu };
inline constexpr const char* kFeatureMapNames[] = {"softmax", "relu", "elu"};  // by FeatureMap

struct Attributes {
  FeatureMap feature_map = FeatureMap::kSoftmax;
  double scale = 0;  // multiplies q . k; 0 stands for D**-0.5 for kSoftmax, and for 1 otherwise
  double feature_epsilon = 1e-3;
  bool packed = false;
  bool key_norm = true;
  // Of near-and-far attention: rows of a block, whether keys after the query are hidden, and
  // whether the log-features of queries have the norm -scale |q|^2 / 2.
  int64_t exact_window = 64;
  bool causal = false, query_norm = true;
  // Of gradients: whether those of the projections and of feature_bias are asked for. Without, those
  // of projections are 0, and on GPUs that which causal attention gives to feature_bias.
  bool projection_gradient = true;

  // The scale in force for key dimension `key_dim` > 0.
  double ResolvedScale(int64_t key_dim) const;
};

// Calls visit(name, member) for each attribute of `attributes`, which may be const. A member is a
// FeatureMap, a double, an int64_t or a bool.
template <class MaybeConstAttributes, class Visit>
void VisitAttributes(MaybeConstAttributes& attributes, const Visit& visit) {
  visit("feature_map", attributes.feature_map);
  visit("scale", attributes.scale);
  visit("feature_epsilon", attributes.feature_epsilon);
  visit("packed", attributes.packed);
  visit("key_norm", attributes.key_norm);
  visit("exact_window", attributes.exact_window);
  visit("causal", attributes.causal);
  visit("query_norm", attributes.query_norm);
  visit("projection_gradient", attributes.projection_gradient);
}

// Whether a TensorFlow op has the attribute: key_norm is one of those that take keys; near-and-far
// attention has three of its own, and no choice of the feature map; projection_gradient is one of
// gradients.
bool HasAttribute(Op op, const std::string& name);

// The largest exact_window, which keeps the scores of a row in memory.
inline constexpr int64_t kMaxExactWindow = 65536;

// Requires scale and feature_epsilon to be finite and >= 0, and 0 < exact_window <= the largest.
Status ValidateAttributes(const Attributes& attributes);

inline const char* NameOf(FeatureMap map) { return kFeatureMapNames[static_cast<int>(map)]; }
Status ParseFeatureMap(const std::string& name, FeatureMap* map);

}  // namespace performer
