// The Python module performer_emulated, for tests: the CUDA kernels on NumPy arrays, run by the
// emulator (cc/sim).
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

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

// Memory. That of a GPU may hold anything; this one holds NaN. So do the bytes before and behind a
// buffer, which nothing may write. AddressSanitizer has guards of its own, which see reads too.
class Memory {
 public:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kGuard = 0;
#else
  static constexpr size_t kGuard = 1024;
#endif
  static constexpr unsigned char kFill = 0xFF;

  void* Allocate(size_t bytes) {
    void* block = nullptr;
    if (posix_memalign(&block, 256, bytes + 2 * kGuard) != 0) throw std::bad_alloc();
    buffers_.push_back(
        {std::unique_ptr<unsigned char, FreeDeleter>(static_cast<unsigned char*>(block)), bytes});
    std::memset(block, kFill, bytes + 2 * kGuard);
    unsigned char* const buffer = static_cast<unsigned char*>(block) + kGuard;
    sim::CountTraffic(buffer, bytes);
    return buffer;
  }

  ~Memory() { sim::CountNoTraffic(); }

  // A buffer that kernels write: the race detector watches it.
  void* AllocateTracked(size_t bytes) {
    void* buffer = Allocate(bytes);
    sim::Track(buffer, bytes);
    return buffer;
  }

  const void* Copy(const void* data, size_t bytes) {
    void* buffer = Allocate(bytes);
    if (bytes > 0) std::memcpy(buffer, data, bytes);
    return buffer;
  }

  // A device with memory for `limit` buffers of workspace, -1 for any number.
  cuda::Device MakeDevice(int limit) {
    cuda::Device device;
    device.allocate = [this, limit, made = 0](size_t bytes) mutable -> void* {
      return made++ == limit ? nullptr : AllocateTracked(bytes);
    };
    return device;
  }

  // An error if something was written outside of the buffers.
  Status CheckGuards() const {
    for (const Buffer& buffer : buffers_) {
      const unsigned char* front = buffer.block.get();
      const unsigned char* back = front + kGuard + buffer.bytes;
      for (size_t i = 0; i < kGuard; ++i)
        if (front[i] != kFill || back[i] != kFill)
          return Status::Internal("a kernel wrote " +
                                  std::string(front[i] != kFill ? "before" : "behind") +
                                  " a buffer of " + std::to_string(buffer.bytes) + " bytes");
    }
    return Status();
  }

 private:
  struct Buffer {
    std::unique_ptr<unsigned char, FreeDeleter> block;
    size_t bytes;  // without the guards
  };
  std::vector<Buffer> buffers_;
};

// Captures the call as a graph and runs that twice, when nothing is left of the call on the host.
Status RunCaptured(Op op, Call call, const cuda::Device& device) {
  sim::Graph graph;
  sim::TheGraph() = &graph;
  const Status status = cuda::Run(op, call, device);
  sim::TheGraph() = nullptr;
  if (!status.ok()) return status;
  std::fill(call.offsets.begin(), call.offsets.end(), -(int64_t{1} << 40));
  try {
    for (int i = 0; i < 2; ++i)
      for (const auto& launch : graph) launch();
  } catch (const sim::Error& error) {
    return Status::Internal(error.what());
  }
  return Status();
}

py::dict Run(const std::string& name, const py::dict& given, const std::string& order,
             uint64_t seed, const std::string& skip, int allocations, int shared_bytes,
             const std::string& tensor_cores, bool captured, const py::kwargs& attributes) {
  const ArrayCall made = MakeArrayCall(name, given, attributes);
  sim::TheOptions() = {ParseOrder(order), seed, skip, sim::ParseTensorCores(tensor_cores)};
  Memory memory;
  Call call = made.call;  // with buffers of `memory`
  for (size_t i = 0; i < made.inputs.size(); ++i)
    call.inputs[i] = memory.Copy(made.inputs[i].data(), made.inputs[i].nbytes());
  std::vector<size_t> sizes;
  for (auto result : made.results) {
    sizes.push_back(py::reinterpret_borrow<py::array>(result.second).nbytes());
    call.outputs[sizes.size() - 1] = memory.AllocateTracked(sizes.back());
  }
  cuda::Device device = memory.MakeDevice(allocations);
  device.shared_bytes = shared_bytes;
  Status status = captured ? RunCaptured(made.op, call, device) : cuda::Run(made.op, call, device);
  sim::UntrackAll();
  sim::TheOptions() = sim::Options();
  if (status.ok()) status = memory.CheckGuards();
  ThrowIfError(status);
  for (size_t i = 0; i < made.inputs.size(); ++i)
    if (std::memcmp(call.inputs[i], made.inputs[i].data(), made.inputs[i].nbytes()) != 0)
      ThrowIfError(Status::Internal("a kernel wrote an input"));
  for (size_t i = 0; i < sizes.size(); ++i)
    std::memcpy(made.call.outputs[i], call.outputs[i], sizes[i]);
  return made.results;
}

py::array Planted(const std::string& kernel, const py::array_t<float, py::array::c_style>& x,
                  bool bug, unsigned blocks, unsigned threads, const std::string& order,
                  uint64_t seed) {
  if (x.size() < py::ssize_t{10} * threads)
    throw py::value_error("x must have 10 * threads numbers; got " + std::to_string(x.size()));
  py::array_t<float> out(py::ssize_t{4} * blocks * threads);
  sim::TheOptions().order = ParseOrder(order);
  sim::TheOptions().seed = seed;
  Memory memory;
  const float* given = static_cast<const float*>(memory.Copy(x.data(), x.nbytes()));
  float* buffer = static_cast<float*>(memory.AllocateTracked(out.nbytes()));
  Status status;
  try {
    if (!planted::Run(kernel, bug, blocks, threads, given, buffer))
      status = Status::InvalidArgument("no planted kernel is called '" + kernel + "'");
  } catch (const sim::Error& error) {
    status = Status::Internal(error.what());
  }
  sim::UntrackAll();
  sim::TheOptions() = sim::Options();
  if (status.ok()) status = memory.CheckGuards();
  ThrowIfError(status);
  std::memcpy(out.mutable_data(), buffer, out.nbytes());
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

py::dict TrafficByLaunch() {
  py::dict result;
  for (const auto& [name, traffic] : sim::TheTraffic()) {
    py::dict of;
    of["read"] = traffic.read;
    of["written"] = traffic.written;
    of["block_read"] = traffic.block_read;
    of["block_written"] = traffic.block_written;
    of["shared_read"] = traffic.shared_read;
    of["shared_written"] = traffic.shared_written;
    result[name.c_str()] = of;
  }
  return result;
}

}  // namespace
}  // namespace performer

PYBIND11_MODULE(performer_emulated, module) {
  using namespace performer;
  using py::arg;
  module.doc() = "The CUDA kernels on NumPy arrays, under emulation.";
  module.def(
      "run", performer::Run, arg("op"), arg("inputs"), py::kw_only(), arg("order") = "random",
      arg("seed") = 1, arg("skip") = "", arg("allocations") = -1, arg("shared_bytes") = 0,
      arg("tensor_cores") = "H100", arg("captured") = false,
      "As performer._core.run. `order` and `seed`: the schedule; `skip`: a barrier or wait "
      "that is left out; `allocations`: the number for which the device has memory, or -1 "
      "for any number; `shared_bytes`: the most that a block may have, or 0 for that of "
      "sm_80; `tensor_cores`: H100 or A100, how they add (sim/tensor_cores.h); `captured`: as a "
      "graph, which then runs twice.\n"
      "Raises RuntimeError for an error of a kernel.");
  module.def("counters", performer::Counters, "The numbers of instructions since the last reset.");
  module.def(
      "traffic", performer::TrafficByLaunch,
      "The bytes that launches moved since the last reset, by the name that messages have for "
      "them: see sim/emulator.h. Empty in a build without the race detector.");
  module.def("reset_counters", [] {
    sim::TheCounters() = sim::Counters();
    sim::TheTraffic().clear();
  });
  module.def(
      "sites", [] { return sim::Sites(); },
      "The barriers and waits reached since the last reset, as \"file:line\".");
  module.def("reset_sites", [] { sim::Sites().clear(); });
  module.def(
      "races", [] { return py::make_tuple(sim::TheRaces().count, sim::TheRaces().report); },
      "The number of races since the last reset, and a report of the first ones.");
  module.def("reset_races", sim::ResetRaces);
  module.def("planted", performer::Planted, arg("kernel"), arg("x"), arg("bug"), arg("blocks") = 2,
             arg("threads") = 64, arg("order") = "random", arg("seed") = 1,
             "Runs a kernel of planted.cuh, with its bug or without; returns its output.");
  module.attr("split_rows") = cuda::kSplitUnit;
  module.attr("small_shared_bytes") = cuda::kSmallSharedBytes;
  module.attr("detects_races") = sim::DetectsRaces();
#if defined(__SANITIZE_ADDRESS__)
  module.attr("detects_addresses") = true;
#else
  module.attr("detects_addresses") = false;
#endif
}
