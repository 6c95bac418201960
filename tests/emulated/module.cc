// Python module performer_emulated, for tests: the CUDA kernels on NumPy arrays, run by the
// emulator (cc/sim).
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "bindings/arrays.h"
#include "cuda/host/schedule.h"
#include "cuda/run.h"
#include "emulated/planted.h"
#include "sim/emulator.h"

namespace performer {
namespace {

using namespace bindings;

sim::Order ParseOrder(const std::string& name) {
  const std::map<std::string, sim::Order> orders = {{"forward", sim::Order::kForward},
                                                    {"reverse", sim::Order::kReverse},
                                                    {"random", sim::Order::kRandom},
                                                    {"fair", sim::Order::kFair}};
  const auto found = orders.find(name);
  if (found == orders.end())
    throw py::value_error("order must be forward, reverse, random or fair; got '" + name + "'");
  return found->second;
}

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

// Workspace as a GPU has it: it holds anything; here NaN.
class Memory {
 public:
  cuda::Device MakeDevice() {
    cuda::Device device;
    device.allocate = [this](size_t bytes) -> void* {
      if (limit_ >= 0 && static_cast<int>(blocks_.size()) >= limit_) return nullptr;
      void* block = nullptr;
      if (posix_memalign(&block, 256, bytes) != 0) return nullptr;
      std::memset(block, 0xFF, bytes);
      blocks_.emplace_back(block);
      sim::Track(block, bytes);
      return block;
    };
    return device;
  }
  void set_limit(int limit) { limit_ = limit; }

 private:
  int limit_ = -1;
  std::vector<std::unique_ptr<void, FreeDeleter>> blocks_;
};

py::dict Run(const std::string& name, const py::dict& given, const std::string& order,
             uint64_t seed, const std::string& skip, int allocations, int shared_bytes,
             const py::kwargs& attributes) {
  const ArrayCall made = MakeArrayCall(name, given, attributes);
  sim::TheOptions() = {ParseOrder(order), seed, skip};
  for (auto result : made.results) {
    auto array = py::reinterpret_borrow<py::array>(result.second);
    std::memset(array.mutable_data(), 0xFF, array.nbytes());
    sim::Track(array.data(), array.nbytes());
  }
  Memory memory;
  memory.set_limit(allocations);
  cuda::Device device = memory.MakeDevice();
  device.shared_bytes = shared_bytes;
  const Status status = cuda::Run(made.op, made.call, device);
  sim::UntrackAll();
  sim::TheOptions() = sim::Options();
  ThrowIfError(status);
  return made.results;
}

py::array Planted(const std::string& kernel, const py::array_t<float, py::array::c_style>& x,
                  bool bug, unsigned blocks, unsigned threads, const std::string& order,
                  uint64_t seed) {
  if (x.size() < py::ssize_t{10} * threads)
    throw py::value_error("x must have 10 * threads numbers; got " + std::to_string(x.size()));
  py::array_t<float> out(py::ssize_t{4} * blocks * threads);
  std::fill_n(out.mutable_data(), out.size(), NAN);
  sim::TheOptions() = {ParseOrder(order), seed, ""};
  sim::Track(out.data(), out.nbytes());
  Status status;
  try {
    if (!planted::Run(kernel, bug, blocks, threads, x.data(), out.mutable_data()))
      status = Status::InvalidArgument("no planted kernel is called '" + kernel + "'");
  } catch (const sim::Error& error) {
    status = Status::Internal(error.what());
  }
  sim::UntrackAll();
  sim::TheOptions() = sim::Options();
  ThrowIfError(status);
  return out;
}

py::dict Counters() {
  const sim::Counters& counters = sim::TheCounters();
  py::dict result;
  result["blocks"] = counters.blocks;
  result["barriers"] = counters.barriers;
  result["shuffles"] = counters.shuffles;
  result["copies"] = counters.copies;
  result["exponentials"] = counters.exponentials;
  result["mma"] = counters.mma;
  result["ldmatrix"] = counters.ldmatrix;
  result["ldmatrix_conflicts"] = counters.ldmatrix_conflicts;
  return result;
}

}  // namespace
}  // namespace performer

PYBIND11_MODULE(performer_emulated, module) {
  using namespace performer;
  using py::arg;
  module.doc() = "The CUDA kernels on NumPy arrays, under emulation.";
  module.def("run", performer::Run, arg("op"), arg("inputs"), py::kw_only(),
             arg("order") = "random", arg("seed") = 1, arg("skip") = "", arg("allocations") = -1,
             arg("shared_bytes") = 0,
             "As performer._core.run. `order` and `seed`: the schedule; `skip`: a barrier or wait "
             "that is left out; `allocations`: how many the device has memory for, -1 all; "
             "`shared_bytes`: of a block at most, 0 as on sm_80.\n"
             "Raises RuntimeError for what a kernel did wrong.");
  module.def("counters", performer::Counters, "Numbers of instructions since the last reset.");
  module.def("reset_counters", [] { sim::TheCounters() = sim::Counters(); });
  module.def(
      "sites", [] { return sim::Sites(); },
      "Barriers and waits reached since the last reset, \"file:line\".");
  module.def("reset_sites", [] { sim::Sites().clear(); });
  module.def(
      "races", [] { return py::make_tuple(sim::TheRaces().count, sim::TheRaces().report); },
      "Number of races since the last reset, and the first ones in words.");
  module.def("reset_races", sim::ResetRaces);
  module.def("planted", performer::Planted, arg("kernel"), arg("x"), arg("bug"), arg("blocks") = 2,
             arg("threads") = 64, arg("order") = "random", arg("seed") = 1,
             "A kernel of planted.cuh, with its bug or without; returns its output.");
  module.attr("split_rows") = cuda::kSplitUnit;
  module.attr("small_shared_bytes") = cuda::kSmallSharedBytes;
  module.attr("detects_races") = sim::DetectsRaces();
#if defined(__SANITIZE_ADDRESS__)
  module.attr("detects_addresses") = true;
#else
  module.attr("detects_addresses") = false;
#endif
}
