// From the arguments of a Python function to a checked Call, whether the tensors lie on the host or
// on a GPU. Errors become exceptions.
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
#define PERFORMER_FIND_OP(op) \
  if (name == #op) return Op::k##op;
  PERFORMER_FOR_EACH_OP(PERFORMER_FIND_OP)
#undef PERFORMER_FIND_OP
  std::string names;
  for (const Op op : kAllOps)
    names += (names.empty() ? "" : ", ") + std::string(SignatureOf(op).name).substr(10);
  throw py::value_error("op must be one of " + names + "; got '" + name + "'");
}

inline const char* TypeName(DType dtype, ArgumentType type) {
  if (type == ArgumentType::kOffsets || type == ArgumentType::kStart) return "int64";
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

// A tensor that comes from Python.
struct Tensor {
  const void* data = nullptr;
  Shape shape;
  std::string dtype;
};

// One attribute from a Python object.
inline void Assign(const py::object& object, bool* value) { *value = object.cast<bool>(); }
inline void Assign(const py::object& object, int64_t* value) { *value = object.cast<int64_t>(); }
inline void Assign(const py::object& object, double* value) { *value = object.cast<double>(); }
inline void Assign(const py::object& object, FeatureMap* value) {
  ThrowIfError(ParseFeatureMap(object.cast<std::string>(), value));
}

// The attributes among the keyword arguments of a function; the others have their defaults. Takes
// them out of `given`. Doubles are rounded to float32, as the attributes of the TensorFlow ops are.
// Raises TypeError for other keyword arguments and for values of a wrong type.
inline Attributes TakeAttributes(py::kwargs given) {
  Attributes attributes;
  VisitAttributes(attributes, [&](const char* name, auto& value) {
    try {
      if (given.contains(name)) Assign(given.attr("pop")(name), &value);
    } catch (const py::cast_error&) {
      throw py::type_error(std::string(name) + " has a value of a wrong type");
    }
    if constexpr (std::is_same_v<decltype(value), double&>) value = static_cast<float>(value);
  });
  for (const auto& argument : given)
    throw py::type_error("unexpected keyword argument " + std::string(py::repr(argument.first)));
  return attributes;
}

// A call without outputs, and the shapes that the outputs must have. find(name) returns an input as
// a Tensor; "offsets" lies in host memory. Raises ValueError for a wrong argument.
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
      if (dim < 0)  // -1 would pass as an unknown dimension
        throw py::value_error(std::string(argument.name) +
                              " must have dimensions of at least 0; got shape " +
                              std::string(py::str(py::cast(tensor.shape.dims))));
    call.input_shapes.push_back(tensor.shape);
    call.inputs.push_back(tensor.data);
  }
  ThrowIfError(InferShapes(op, attributes, call.input_shapes, &call.dims, output_shapes));
  ThrowIfError(TakeOffsets(op, &call));
  return call;
}

}  // namespace bindings
}  // namespace performer
