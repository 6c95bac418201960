// Calls of the operators on NumPy arrays: from a dict of arrays to a checked Call whose outputs are
// new arrays. Shared by the Python modules that run kernels on NumPy buffers.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "core/params.h"
#include "core/signature.h"

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

inline std::string NameOf(const py::array& array) { return py::str(array.dtype()); }

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

struct ArrayCall {
  Op op;
  Call call;
  std::vector<py::array> inputs;  // what call.inputs points to
  py::dict results;               // what call.outputs points to, by name
};

// Raises ValueError for a wrong argument.
inline ArrayCall MakeArrayCall(const std::string& name, const py::dict& given,
                               const std::string& feature_map, float scale, bool key_norm,
                               float feature_epsilon, bool packed) {
  ArrayCall made;
  made.op = FindOp(name);
  const Signature& signature = SignatureOf(made.op);
  Call& call = made.call;
  ThrowIfError(ParseFeatureMap(feature_map, &call.attributes.feature_map));
  call.attributes.scale = scale;
  call.attributes.key_norm = key_norm;
  call.attributes.feature_epsilon = feature_epsilon;
  call.attributes.packed = packed;

  std::vector<py::array>& inputs = made.inputs;
  for (const Argument& argument : signature.inputs) {
    if (!given.contains(argument.name))
      throw py::value_error(std::string("inputs must have '") + argument.name + "'");
    inputs.push_back(py::array::ensure(given[argument.name], py::array::c_style));
    if (!inputs.back()) throw py::value_error(std::string(argument.name) + " must be an array");
    const std::string type = NameOf(inputs.back());
    if (&argument == &signature.inputs[0]) call.dtype = ParseDType(argument.name, type);
    if (type != TypeName(call.dtype, argument.type))
      throw py::value_error(std::string(argument.name) + " must have dtype " +
                            TypeName(call.dtype, argument.type) + "; got " + type);
    Shape shape;
    shape.dims.assign(inputs.back().shape(), inputs.back().shape() + inputs.back().ndim());
    call.input_shapes.push_back(shape);
    call.inputs.push_back(inputs.back().data());
  }
  std::vector<Shape> output_shapes;
  ThrowIfError(
      InferShapes(made.op, call.attributes, call.input_shapes, &call.dims, &output_shapes));
  if (packed) {
    const bool reads = made.op == Op::kRead || made.op == Op::kReadGrad;
    size_t at = 0;
    while (signature.inputs[at].type != ArgumentType::kOffsets) ++at;
    ThrowIfError(ValidateOffsets(static_cast<const int64_t*>(call.inputs[at]), call.dims.sequences,
                                 reads ? call.dims.queries : call.dims.keys));
  }
  for (size_t i = 0; i < signature.outputs.size(); ++i) {
    const Argument& output = signature.outputs[i];
    // The type objects of bfloat16 come from the inputs: NumPy itself does not know it.
    const py::dtype dtype = output.type == ArgumentType::kTensor
                                ? inputs[0].dtype()
                                : py::dtype(TypeName(call.dtype, output.type));
    py::array array(dtype, output_shapes[i].dims);
    call.outputs.push_back(array.mutable_data());
    made.results[output.name] = array;
  }
  return made;
}

}  // namespace bindings
}  // namespace performer
