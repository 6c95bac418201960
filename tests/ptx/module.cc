// The Python module performer_ptx, for tests: the CUDA operators on NumPy arrays. Their host code
// is that of the library; their kernels are the PTX that `load` was given, interpreted.
#include "bindings/arrays.h"
#include "cuda/host/schedule.h"
#include "cuda/run.h"
#include "ptx/machine.h"
#include "ptx/runtime.h"

namespace performer {
namespace ptx {
namespace {

using namespace bindings;

Order ParseOrder(const std::string& name) {
  const std::map<std::string, Order> orders = {
      {"forward", Order::kForward}, {"reverse", Order::kReverse}, {"random", Order::kRandom}};
  const auto found = orders.find(name);
  if (found == orders.end())
    throw py::value_error("order must be forward, reverse or random; got '" + name + "'");
  return found->second;
}

void Load(const std::string& text) {
  try {
    for (auto& [name, kernel] : ParseProgram(text)) TheRuntime().program[name] = std::move(kernel);
  } catch (const Error& error) {
    throw py::value_error(error.what());
  }
}

py::dict RunOperator(const std::string& name, const py::dict& given, const std::string& order,
                     uint64_t seed, int shared_bytes, const std::string& tensor_cores, bool fused,
                     const py::kwargs& attributes) {
  const ArrayCall made = MakeArrayCall(name, given, attributes);
  Runtime& runtime = TheRuntime();
  runtime.max_shared_bytes = shared_bytes;
  runtime.error.clear();
  TheOptions() = {ParseOrder(order), seed, sim::ParseTensorCores(tensor_cores), fused};
  GlobalMemory memory;
  Call call = made.call;  // with buffers of `memory`
  for (size_t i = 0; i < made.inputs.size(); ++i)
    call.inputs[i] = memory.Copy(made.inputs[i].data(), made.inputs[i].nbytes());
  std::vector<size_t> sizes;
  for (auto result : made.results) {
    sizes.push_back(py::reinterpret_borrow<py::array>(result.second).nbytes());
    call.outputs[sizes.size() - 1] = memory.Allocate(sizes.back(), true);
  }
  cuda::Device device;
  device.allocate = [&](size_t bytes) { return memory.Allocate(bytes, true); };
  device.shared_bytes = shared_bytes;
  TheMemory() = &memory;
  const Status status = cuda::Run(made.op, call, device);
  TheMemory() = nullptr;
  ThrowIfError(status);
  for (size_t i = 0; i < sizes.size(); ++i)
    std::memcpy(made.call.outputs[i], call.outputs[i], sizes[i]);
  return made.results;
}

// A kernel whose parameter is two pointers, to words that it is given and to words that it writes.
py::array_t<uint32_t> LaunchOnWords(const std::string& name,
                                    const py::array_t<uint32_t, py::array::c_style>& given,
                                    py::ssize_t words, unsigned blocks, unsigned threads,
                                    uint32_t shared_bytes, const std::string& order, uint64_t seed,
                                    const std::string& tensor_cores) {
  const auto kernel = TheRuntime().program.find(name);
  if (kernel == TheRuntime().program.end()) throw py::value_error("no kernel is called " + name);
  TheOptions() = {ParseOrder(order), seed, sim::ParseTensorCores(tensor_cores), true};
  GlobalMemory memory;
  py::array_t<uint32_t> result(words);
  const size_t bytes = static_cast<size_t>(words) * sizeof(uint32_t);
  void* const written = memory.Allocate(bytes, true);
  const void* const params[2] = {memory.Copy(given.data(), given.nbytes()), written};
  if (kernel->second.param_bytes != sizeof params)
    throw py::value_error(name + " must have one parameter of two pointers");
  Launch launch;
  launch.kernel = &kernel->second;
  launch.grid.x = blocks;
  launch.block.x = threads;
  launch.shared_bytes = shared_bytes;
  launch.params = reinterpret_cast<const unsigned char*>(params);
  TheMemory() = &memory;
  Status status;
  try {
    Run(launch);
  } catch (const Error& error) {
    status = Status::Internal(error.what());
  }
  TheMemory() = nullptr;
  ThrowIfError(status);
  std::memcpy(result.mutable_data(), written, bytes);
  return result;
}

// By kernel that is loaded: the instructions that have acted, and all.
std::map<std::string, std::pair<size_t, size_t>> Coverage() {
  std::map<std::string, std::pair<size_t, size_t>> coverage;
  for (const auto& [name, kernel] : TheRuntime().program) {
    size_t ran = 0;
    for (const uint8_t acted : kernel.ran) ran += acted;
    coverage[name] = {ran, kernel.code.size()};
  }
  return coverage;
}

}  // namespace
}  // namespace ptx
}  // namespace performer

PYBIND11_MODULE(performer_ptx, module) {
  namespace py = pybind11;
  namespace ptx = performer::ptx;
  namespace cuda = performer::cuda;
  using py::arg;
  module.doc() = "The CUDA operators on NumPy arrays, whose kernels are interpreted PTX.";
  module.def(
      "load", ptx::Load, arg("text"),
      "Takes the kernels of PTX, in place of those of the same names. Raises ValueError, which "
      "names the instruction, for one that is not known.");
  module.def("run", ptx::RunOperator, arg("op"), arg("inputs"), py::kw_only(),
             arg("order") = "random", arg("seed") = 1, arg("shared_bytes") = cuda::kMaxSharedBytes,
             arg("tensor_cores") = "H100", arg("fused") = true,
             "As performer._core.run. `order` and `seed`: in which blocks and warps take turns; "
             "`shared_bytes`: the most that a block may have; `tensor_cores`: H100 or A100, how "
             "they add (sim/tensor_cores.h); `fused`: False rounds the product of an fma, as the "
             "sources do which have none. Raises RuntimeError for an error of a kernel.");
  module.def("launch", ptx::LaunchOnWords, arg("kernel"), arg("given"), arg("words"), py::kw_only(),
             arg("blocks") = 1, arg("threads") = ptx::kLanes, arg("shared_bytes") = 0,
             arg("order") = "random", arg("seed") = 1, arg("tensor_cores") = "H100",
             "Runs a kernel that takes a pointer to words it is given, and one to `words` that it "
             "writes and this returns. Raises as `run`.");
  module.def(
      "launches", [] { return ptx::TheRuntime().launches; },
      "How often each kernel was launched so far, by mangled name.");
  module.def("coverage", ptx::Coverage,
             "By mangled name of a kernel: the number of its instructions that have run since it "
             "was loaded, and that of all.");
  module.attr("split_rows") = cuda::kSplitUnit;
  module.attr("library") = PERFORMER_PTX_LIBRARY;
}
