// The Python module performer._core: the operators on NumPy arrays, without TensorFlow.
#include <cxxabi.h>
#include <unistd.h>

#include <algorithm>
#include <new>
#include <system_error>
#include <thread>

#include "bindings/arrays.h"
#include "bindings/gpu.h"
#include "cpu/dispatch.h"
#include "cpu/run.h"

namespace py = pybind11;

namespace performer {
namespace {

using namespace bindings;

// The most threads of a call. Every parallel loop starts its own.
constexpr int64_t kMaxThreads = 1024;

// `threads` threads with equal shares of the items, or one for each item where these are fewer.
cpu::Threads MakeThreads(int64_t threads) {
  const auto parallel_for = [threads](int64_t count, int64_t,
                                      const std::function<void(int64_t, int64_t)>& body) {
    if (count == 0) return;
    const int64_t shares = std::min(threads, count), size = count / shares, rest = count % shares;
    const auto run = [&](int64_t share) {
      const int64_t begin = size * share + std::min(share, rest);
      body(begin, begin + size + (share < rest ? 1 : 0));
    };
    std::vector<std::thread> workers;
    workers.reserve(shares - 1);
    int64_t started = 1;
    try {
      for (; started < shares; ++started) workers.emplace_back(run, started);
    } catch (const std::system_error&) {
      // The system gives no more threads: this one does their work.
    }
    run(0);
    for (int64_t share = started; share < shares; ++share) run(share);
    for (std::thread& worker : workers) worker.join();
  };
  return {threads, parallel_for};
}

// Calls function(), which throws nothing, without the lock of the interpreter.
//
// A daemon thread may still be in the function when the interpreter ends, and then never gets the
// lock. CPython before 3.14 unwinds the stack of such a thread, with destructors of Python objects
// that must not run without the lock, and the process aborts at the first destructor that asks for
// it. So the thread sleeps here until the process has ended, as it does in CPython from 3.14 on.
template <class Function>
Status WithoutLock(const Function& function) {
  PyThreadState* const thread = PyEval_SaveThread();
  Status status = function();
  try {
    PyEval_RestoreThread(thread);
  } catch (...) {  // abi::__forced_unwind, nothing else
    for (;;) pause();
  }
  return status;
}

py::dict Run(const std::string& name, const py::dict& given, int64_t threads,
             const std::string& isa, const py::kwargs& attributes) {
  FindOp(name);
  if (threads < 1 || threads > kMaxThreads)
    throw py::value_error("threads must be at least 1 and at most " + std::to_string(kMaxThreads) +
                          "; got " + std::to_string(threads));
  const ArrayCall made = MakeArrayCall(name, given, attributes);
  ThrowIfError(WithoutLock([&]() -> Status {
    try {
      return cpu::Run(made.op, made.call, MakeThreads(threads), isa);
    } catch (const std::bad_alloc&) {
      return Status::ResourceExhausted("out of memory");
    }
  }));
  return made.results;
}

py::dict SignatureDict(const std::string& name) {
  const Op op = FindOp(name);
  const auto list = [](const std::vector<Argument>& arguments) {
    py::list rows;
    for (const Argument& argument : arguments)
      rows.append(py::make_tuple(argument.name, NameOf(argument.type), argument.shape));
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
  const std::string name = NameOf(x);
  if (name == "float64") return Elementwise<double>(x, isa, exp2);
  if (name == "float32") return Elementwise<float>(x, isa, exp2);
  throw py::value_error("x must be float32 or float64; got " + name);
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
  module.def("run", performer::Run, arg("op"), arg("inputs"), py::kw_only(), arg("threads") = 1,
             arg("isa") = "",
             "Runs one operator (\"Summarize\", ..., \"NearFarGrad\") on a dict of arrays by input "
             "name; returns a dict of its outputs.\n\n"
             "threads: at most 1024. Other keyword arguments are the attributes of the operator: "
             "feature_map, scale, feature_epsilon, packed, key_norm, exact_window, causal, "
             "query_norm, projection_gradient. scale and feature_epsilon are rounded to float32, "
             "as the attributes of "
             "the TensorFlow ops are.\n"
             "Raises ValueError for a wrong argument, TypeError for an unknown one, and "
             "MemoryError.");
  module.def("signature", performer::SignatureDict, arg("op"),
             "Names, types and shapes of an operator's inputs and outputs.");
  module.def("isas", performer::cpu::AvailableIsas,
             "The instruction sets that this build and this processor share, the best last.");
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
  performer::bindings::DefineGpu(module);
}
