#include "core/attributes.h"

#include <cmath>
#include <iterator>
#include <sstream>

namespace performer {

double Attributes::ResolvedScale(int64_t key_dim) const {
  if (scale != 0) return scale;
  return feature_map == FeatureMap::kSoftmax ? 1.0 / std::sqrt(static_cast<double>(key_dim)) : 1.0;
}

bool HasAttribute(Op op, const std::string& name) {
  if (name == "projection_gradient") return IsGrad(op);
  if (name == "exact_window" || name == "causal" || name == "query_norm") return IsNearFar(op);
  if (name == "feature_map" || name == "feature_epsilon") return !IsNearFar(op);
  return HasKeys(op) || name != "key_norm";
}

static Status RequireFiniteAndNotNegative(const char* name, const char* zero, double value) {
  if (std::isfinite(value) && value >= 0) return Status();
  std::ostringstream message;
  message << name << " must be finite and positive (0: " << zero << "); got " << value;
  return Status::InvalidArgument(message.str());
}

Status ValidateAttributes(const Attributes& attributes) {
  PERFORMER_RETURN_IF_ERROR(RequireFiniteAndNotNegative("scale", "the default", attributes.scale));
  PERFORMER_RETURN_IF_ERROR(
      RequireFiniteAndNotNegative("feature_epsilon", "none", attributes.feature_epsilon));
  if (attributes.exact_window > 0 && attributes.exact_window <= kMaxExactWindow) return Status();
  return Status::InvalidArgument("exact_window must be at least 1 and at most " +
                                 std::to_string(kMaxExactWindow) + "; got " +
                                 std::to_string(attributes.exact_window));
}

Status ParseFeatureMap(const std::string& name, FeatureMap* map) {
  std::string names;
  for (size_t i = 0; i < std::size(kFeatureMapNames); ++i) {
    if (name == kFeatureMapNames[i]) {
      *map = static_cast<FeatureMap>(i);
      return Status();
    }
    names += (i == 0 ? "'" : ", '") + std::string(kFeatureMapNames[i]) + "'";
  }
  return Status::InvalidArgument("feature_map must be one of " + names + "; got '" + name + "'");
}

}  // namespace performer
