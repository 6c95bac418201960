// Translation between TensorFlow and the core: attributes, types, shapes, status.
#pragma once
#include <string>

#include "core/attributes.h"
#include "core/schema.h"
#include "tensorflow/core/framework/types.h"
#include "tensorflow/core/platform/errors.h"

namespace performer {

inline absl::Status ToTensorFlow(const Status& status) {
  switch (status.code()) {
    case Code::kOk:
      return absl::OkStatus();
    case Code::kInvalidArgument:
      return absl::InvalidArgumentError(status.message());
    case Code::kFailedPrecondition:
      return absl::FailedPreconditionError(status.message());
    case Code::kResourceExhausted:
      return absl::ResourceExhaustedError(status.message());
    case Code::kInternal:
      break;
  }
  return absl::InternalError(status.message());
}

// Reads the attributes of an op from an OpKernelConstruction or InferenceContext; checks that U
// belongs to T.
template <class Context>
absl::Status ReadAttributes(Context* context, Op op, Attributes* attributes) {
  std::string feature_map;
  float scale, feature_epsilon;
  tensorflow::DataType t, u;
  TF_RETURN_IF_ERROR(context->GetAttr("feature_map", &feature_map));
  TF_RETURN_IF_ERROR(context->GetAttr("scale", &scale));
  TF_RETURN_IF_ERROR(context->GetAttr("feature_epsilon", &feature_epsilon));
  TF_RETURN_IF_ERROR(context->GetAttr("packed", &attributes->packed));
  TF_RETURN_IF_ERROR(context->GetAttr("T", &t));
  TF_RETURN_IF_ERROR(context->GetAttr("U", &u));
  if (op != Op::kRead && op != Op::kReadGrad)
    TF_RETURN_IF_ERROR(context->GetAttr("key_norm", &attributes->key_norm));
  TF_RETURN_IF_ERROR(ToTensorFlow(ParseFeatureMap(feature_map, &attributes->feature_map)));
  attributes->scale = scale;
  attributes->feature_epsilon = feature_epsilon;
  TF_RETURN_IF_ERROR(ToTensorFlow(ValidateAttributes(*attributes)));
  if ((t == tensorflow::DT_DOUBLE) != (u == tensorflow::DT_DOUBLE))
    return absl::InvalidArgumentError(
        "U, the type of projections, biases and state, must be double if T is double, else float; "
        "got T = " +
        tensorflow::DataTypeString(t) + ", U = " + tensorflow::DataTypeString(u));
  return absl::OkStatus();
}

}  // namespace performer
