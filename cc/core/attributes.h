// Attributes of the operators, and what they mean.
#pragma once
#include <cstdint>
#include <string>

#include "core/status.h"

namespace performer {

enum class DType { kFloat32, kBFloat16, kHalf, kFloat64 };

// The positive feature map phi; kernels work with its logarithm. With u = sqrt(scale) * (w . x):
//   kSoftmax  log phi = u (keys also - scale |k|^2 / 2 if key_norm)    FAVOR+, arXiv:2009.14794
//   kRelu     log phi = log(max(u, 0) + feature_epsilon)               generalised attention, ibid.
//   kElu      log phi = log(elu(u) + 1)                                arXiv:2006.16236
enum class FeatureMap { kSoftmax, kRelu, kElu };

struct Attributes {
  FeatureMap feature_map = FeatureMap::kSoftmax;
  double scale = 0;  // multiplies q . k; 0: D**-0.5 for kSoftmax, 1 otherwise
  bool key_norm = true;
  double feature_epsilon = 1e-3;
  bool packed = false;

  // The scale in force for key dimension `key_dim` > 0.
  double ResolvedScale(int64_t key_dim) const;
};

// scale and feature_epsilon are finite and >= 0.
Status ValidateAttributes(const Attributes& attributes);

// "softmax", "relu", "elu".
Status ParseFeatureMap(const std::string& name, FeatureMap* map);

}  // namespace performer
