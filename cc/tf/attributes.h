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

// Reads one attribute. What is double here is float32 in TensorFlow.
template <class Context>
absl::Status ReadAttribute(Context* context, const char* name, bool* value) {
  return context->GetAttr(name, value);
}
template <class Context>
absl::Status ReadAttribute(Context* context, const char* name, int64_t* value) {
  return context->GetAttr(name, value);
}
template <class Context>
absl::Status ReadAttribute(Context* context, const char* name, double* value) {
  float narrow;
  TF_RETURN_IF_ERROR(context->GetAttr(name, &narrow));
  *value = narrow;
  return absl::OkStatus();
}
template <class Context>
absl::Status ReadAttribute(Context* context, const char* name, FeatureMap* value) {
  std::string map;
  TF_RETURN_IF_ERROR(context->GetAttr(name, &map));
  return ToTensorFlow(ParseFeatureMap(map, value));
}

// Reads the attributes of an op from an OpKernelConstruction or InferenceContext, and checks that U
// belongs to T.
template <class Context>
absl::Status ReadAttributes(Context* context, Op op, Attributes* attributes) {
  absl::Status status;
  VisitAttributes(*attributes, [&](const char* name, auto& value) {
    if (HasAttribute(op, name)) status.Update(ReadAttribute(context, name, &value));
  });
  TF_RETURN_IF_ERROR(status);
  tensorflow::DataType t, u;
  TF_RETURN_IF_ERROR(context->GetAttr("T", &t));
  TF_RETURN_IF_ERROR(context->GetAttr("U", &u));
  TF_RETURN_IF_ERROR(ToTensorFlow(ValidateAttributes(*attributes)));
  if ((t == tensorflow::DT_DOUBLE) != (u == tensorflow::DT_DOUBLE))
    return absl::InvalidArgumentError(
        "U, the type of projections, biases and state, must be double if T is double, else float; "
        "got T = " +
        tensorflow::DataTypeString(t) + ", U = " + tensorflow::DataTypeString(u));
  return absl::OkStatus();
}

}  // namespace performer
