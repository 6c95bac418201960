// Python module performer._core: the operators on NumPy arrays, without TensorFlow.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <new>
#include <stdexcept>
#include <thread>

#include "core/params.h"
#include "core/signature.h"
#include "cpu/dispatch.h"
#include "cpu/run.h"

namespace py = pybind11;

namespace performer {
namespace {

void ThrowIfError(const Status& status) {
  if (status.ok()) return;
  if (status.code() == Code::kResourceExhausted) {
    PyErr_SetString(PyExc_MemoryError, status.message().c_str());
    throw py::error_already_set();
  }
  throw py::value_error(status.message());
}

Op FindOp(const std::string& name) {
  for (const Op op : kAllOps)
    if (SignatureOf(op).name == "Performer>" + name) return op;
  throw py::value_error(
      "op must be Summarize, Read, Causal, SummarizeGrad, ReadGrad or CausalGrad; got '" + name +
      "'");
}

const char* TypeName(DType dtype, ArgumentType type) {
  if (type == ArgumentType::kOffsets) return "int64";
  if (dtype == DType::kFloat64) return "float64";
  if (type == ArgumentType::kState || dtype == DType::kFloat32) return "float32";
  return dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

std::string NameOf(const py::array& array) { return py::str(array.dtype()); }

DType ParseDType(const std::string& argument, const std::string& name) {
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

// `threads` threads, each with an equal share of the items.
cpu::Threads MakeThreads(int threads) {
  const auto parallel_for = [threads](int64_t count, int64_t,
                                      const std::function<void(int64_t, int64_t)>& body) {
    std::vector<std::thread> workers;
    for (int t = 1; t < threads; ++t)
      workers.emplace_back([&, t] { body(count * t / threads, count * (t + 1) / threads); });
    body(0, count / threads);
    for (std::thread& worker : workers) worker.join();
  };
  return {threads, parallel_for};
}

py::dict Run(const std::string& name, const py::dict& given, const std::string& feature_map,
             float scale, bool key_norm, float feature_epsilon, bool packed, int threads,
             const std::string& isa) {
  const Op op = FindOp(name);
  const Signature& signature = SignatureOf(op);
  if (threads < 1)
    throw py::value_error("threads must be at least 1; got " + std::to_string(threads));
  Call call;
  ThrowIfError(ParseFeatureMap(feature_map, &call.attributes.feature_map));
  call.attributes.scale = scale;
  call.attributes.key_norm = key_norm;
  call.attributes.feature_epsilon = feature_epsilon;
  call.attributes.packed = packed;

  std::vector<py::array> inputs;
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
  ThrowIfError(InferShapes(op, call.attributes, call.input_shapes, &call.dims, &output_shapes));
  if (packed) {
    const bool reads = op == Op::kRead || op == Op::kReadGrad;
    size_t at = 0;
    while (signature.inputs[at].type != ArgumentType::kOffsets) ++at;
    ThrowIfError(ValidateOffsets(static_cast<const int64_t*>(call.inputs[at]), call.dims.sequences,
                                 reads ? call.dims.queries : call.dims.keys));
  }
  py::dict results;
  for (size_t i = 0; i < signature.outputs.size(); ++i) {
    const Argument& output = signature.outputs[i];
    // The type objects of bfloat16 come from the inputs: NumPy itself does not know it.
    const py::dtype dtype = output.type == ArgumentType::kTensor
                                ? inputs[0].dtype()
                                : py::dtype(TypeName(call.dtype, output.type));
    py::array array(dtype, output_shapes[i].dims);
    call.outputs.push_back(array.mutable_data());
    results[output.name] = array;
  }
  Status status;
  {
    py::gil_scoped_release release;
    status = cpu::Run(op, call, MakeThreads(threads), isa);
  }
  ThrowIfError(status);
  return results;
}

py::dict SignatureDict(const std::string& name) {
  const Op op = FindOp(name);
  const auto list = [](const std::vector<Argument>& arguments) {
    py::list rows;
    for (const Argument& argument : arguments) {
      const char* type = argument.type == ArgumentType::kTensor  ? "T"
                         : argument.type == ArgumentType::kState ? "U"
                                                                 : "int64";
      rows.append(py::make_tuple(argument.name, type, argument.shape));
    }
    return rows;
  };
  py::dict result;
  result["inputs"] = list(SignatureOf(op).inputs);
  result["outputs"] = list(SignatureOf(op).outputs);
  return result;
}

template <class Acc>
py::array Elementwise(const py::array& x, const std::string& isa, bool exp2) {
  const cpu::Kernels<Acc>* kernels = nullptr;
  ThrowIfError(cpu::FindKernels(isa, &kernels));
  const py::array_t<Acc, py::array::c_style> in = x;
  if (in.size() % cpu::kPad<Acc> != 0)
    throw py::value_error("x must have a multiple of " + std::to_string(cpu::kPad<Acc>) +
                          " elements; got " + std::to_string(in.size()));
  py::array_t<Acc> out(std::vector<py::ssize_t>(in.shape(), in.shape() + in.ndim()));
  (exp2 ? kernels->exp2 : kernels->log2)(in.data(), in.size(), out.mutable_data());
  return out;
}

py::array ElementwiseOf(const py::array& x, const std::string& isa, bool exp2) {
  const DType dtype = ParseDType("x", NameOf(x));
  return dtype == DType::kFloat64 ? Elementwise<double>(x, isa, exp2)
                                  : Elementwise<float>(x, isa, exp2);
}

std::string ChosenIsa() {
  std::string isa;
  ThrowIfError(cpu::ChosenIsa(&isa));
  return isa;
}

}  // namespace
}  // namespace performer

PYBIND11_MODULE(_core, module) {
  using py::arg;
  module.doc() = "Performer's operators on NumPy arrays, without TensorFlow.";
  module.def("run", performer::Run, arg("op"), arg("inputs"), py::kw_only(),
             arg("feature_map") = "softmax", arg("scale") = 0.0, arg("key_norm") = true,
             arg("feature_epsilon") = 1e-3, arg("packed") = false, arg("threads") = 1,
             arg("isa") = "",
             "Runs one operator (\"Summarize\", ..., \"CausalGrad\") on a dict of arrays by input "
             "name; returns a dict of its outputs.\n\n"
             "scale and feature_epsilon are rounded to float32, as the attributes of the "
             "TensorFlow ops are.\n"
             "Raises ValueError for a wrong argument and MemoryError.");
  module.def("signature", performer::SignatureDict, arg("op"),
             "Names, types and shapes of an operator's inputs and outputs.");
  module.def("isas", performer::cpu::AvailableIsas,
             "Instruction sets that this build and this processor share, the best last.");
  module.def("isa", performer::ChosenIsa,
             "The instruction set in force: the best, or what PERFORMER_ISA names.");
  module.def(
      "exp2",
      [](const py::array& x, const std::string& isa) {
        return performer::ElementwiseOf(x, isa, true);
      },
      arg("x"), arg("isa") = "", "2**x as the kernels compute it.");
  module.def(
      "log2",
      [](const py::array& x, const std::string& isa) {
        return performer::ElementwiseOf(x, isa, false);
      },
      arg("x"), arg("isa") = "", "log2(x) as the kernels compute it.");
}
