// Calls of the operators on NumPy arrays: from a dict of arrays to a checked Call whose outputs are
// new arrays. The Python modules that run kernels on NumPy buffers share this.
#pragma once
#include <pybind11/numpy.h>

#include "bindings/calls.h"

namespace performer {
namespace bindings {

// The name of an array's type, as str() of its dtype. The types of the operators are found without
// running any Python, which takes microseconds for each.
inline std::string NameOf(const py::array& array) {
  constexpr int kNumberOfHalf = 23;  // NPY_HALF, which pybind11 does not name
  const py::dtype dtype = array.dtype();
  const int number = dtype.byteorder() == '=' ? dtype.num() : -1;
  if (number == py::dtype::num_of<float>()) return "float32";
  if (number == py::dtype::num_of<double>()) return "float64";
  if (number == py::dtype::num_of<int64_t>()) return "int64";
  if (number == kNumberOfHalf) return "float16";
  return py::str(dtype);
}

struct ArrayCall {
  Op op;
  Call call;
  std::vector<py::array> inputs;  // what call.inputs points to
  py::dict results;               // what call.outputs points to, by name
};

// Raises ValueError for a wrong argument, and TypeError as TakeAttributes does.
inline ArrayCall MakeArrayCall(const std::string& name, const py::dict& given,
                               const py::kwargs& attributes) {
  ArrayCall made;
  made.op = FindOp(name);
  std::vector<py::array>& inputs = made.inputs;
  const auto find = [&](const char* argument) {
    if (!given.contains(argument))
      throw py::value_error(std::string("inputs must have '") + argument + "'");
    // Rows one after another, each number at an address that is a multiple of its size: where the
    // caller's array is otherwise, this is a copy.
    constexpr int kPlain = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    inputs.push_back(py::array::ensure(given[argument], kPlain));
    const py::array& array = inputs.back();
    if (!array) throw py::value_error(std::string(argument) + " must be an array");
    Tensor tensor{array.data(), {}, NameOf(array)};
    tensor.shape.dims.assign(array.shape(), array.shape() + array.ndim());
    return tensor;
  };
  std::vector<Shape> output_shapes;
  made.call = CheckedCall(made.op, TakeAttributes(attributes), find, &output_shapes);
  const Signature& signature = SignatureOf(made.op);
  for (size_t i = 0; i < signature.outputs.size(); ++i) {
    const Argument& output = signature.outputs[i];
    // The type objects of bfloat16 come from the inputs: NumPy itself does not know it.
    const py::dtype dtype = output.type == ArgumentType::kTensor
                                ? inputs[0].dtype()
                                : py::dtype(TypeName(made.call.dtype, output.type));
    py::array array(dtype, output_shapes[i].dims);
    made.call.outputs.push_back(array.mutable_data());
    made.results[output.name] = array;
  }
  return made;
}

}  // namespace bindings
}  // namespace performer
