// From Python's arguments to a checked Call, wherever the tensors lie. Errors become exceptions.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "core/params.h"
#include "core/schema.h"

namespace performer {
namespace bindings {

namespace py = pybind11;

inline void ThrowIfError(const Status& status) {
  switch (status.code()) {
    case Code::kOk:
      return;
    case Code::kInvalidArgument:
      throw py::value_error(status.message());
    case Code::kResourceExhausted:
      PyErr_SetString(PyExc_MemoryError, status.message().c_str());
      throw py::error_already_set();
    case Code::kFailedPrecondition:
    case Code::kInternal:
      PyErr_SetString(PyExc_RuntimeError, status.message().c_str());
      throw py::error_already_set();
  }
}

inline Op FindOp(const std::string& name) {
  for (const Op op : kAllOps)
    if (SignatureOf(op).name == "Performer>" + name) return op;
  throw py::value_error(
      "op must be Summarize, Read, Causal, SummarizeGrad, ReadGrad or CausalGrad; got '" + name +
      "'");
}

inline const char* TypeName(DType dtype, ArgumentType type) {
  if (type == ArgumentType::kOffsets) return "int64";
  if (dtype == DType::kFloat64) return "float64";
  if (type == ArgumentType::kState || dtype == DType::kFloat32) return "float32";
  return dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

inline DType ParseDType(const std::string& argument, const std::string& name) {
  const std::map<std::string, DType> types = {{"float32", DType::kFloat32},
                                              {"bfloat16", DType::kBFloat16},
                                              {"float16", DType::kHalf},
                                              {"float64", DType::kFloat64}};
  const auto found = types.find(name);
  if (found == types.end())
    throw py::value_error(argument +
                          " must have dtype float32, bfloat16, float16 or float64; got " + name);
  return found->second;
}

// A tensor that Python gave.
struct Tensor {
  const void* data = nullptr;
  Shape shape;
  std::string dtype;
};

inline Attributes MakeAttributes(const std::string& feature_map, float scale, bool key_norm,
                                 float feature_epsilon, bool packed) {
  Attributes attributes;
  ThrowIfError(ParseFeatureMap(feature_map, &attributes.feature_map));
  attributes.scale = scale;
  attributes.key_norm = key_norm;
  attributes.feature_epsilon = feature_epsilon;
  attributes.packed = packed;
  return attributes;
}

// A call without outputs, and the shapes that these must have. `find` gives an input by its name.
// "offsets" lies in the host's memory. Raises ValueError for a wrong argument.
template <class Find>
Call CheckedCall(Op op, const Attributes& attributes, const Find& find,
                 std::vector<Shape>* output_shapes) {
  const Signature& signature = SignatureOf(op);
  Call call;
  call.attributes = attributes;
  for (const Argument& argument : signature.inputs) {
    const Tensor tensor = find(argument.name);
    if (&argument == &signature.inputs[0]) call.dtype = ParseDType(argument.name, tensor.dtype);
    if (tensor.dtype != TypeName(call.dtype, argument.type))
      throw py::value_error(std::string(argument.name) + " must have dtype " +
                            TypeName(call.dtype, argument.type) + "; got " + tensor.dtype);
    for (const int64_t dim : tensor.shape.dims)
      if (dim < 0)  // -1 would pass as a dimension that is not known yet
        throw py::value_error(std::string(argument.name) +
                              " must have dimensions of at least 0; got shape " +
                              std::string(py::str(py::cast(tensor.shape.dims))));
    call.input_shapes.push_back(tensor.shape);
    call.inputs.push_back(tensor.data);
  }
  ThrowIfError(InferShapes(op, attributes, call.input_shapes, &call.dims, output_shapes));
  ThrowIfError(CheckOffsets(op, call));
  return call;
}

}  // namespace bindings
}  // namespace performer
