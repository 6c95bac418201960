// The Python module performer_probes, for tests/gpu: it runs the wrappers of cuda/device/ptx.h one
// at a time.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "bindings/calls.h"
#include "gpu/probes.h"

namespace performer {
namespace {

namespace py = pybind11;

constexpr py::ssize_t kLanes = 32, kIn = 12, kOut = 4;

py::array Run(const std::string& name, const py::array_t<uint32_t, py::array::c_style>& in) {
  if (in.ndim() != 3 || in.shape(1) != kLanes || in.shape(2) != kIn)
    throw py::value_error("x must have shape [warps, 32, 12]");
  std::vector<uint32_t> out;
  bindings::ThrowIfError(probes::Run(name, in.shape(0), in.data(), &out));
  py::array_t<uint32_t> result({in.shape(0), kLanes, kOut});
  std::copy(out.begin(), out.end(), result.mutable_data());
  return result;
}

}  // namespace
}  // namespace performer

PYBIND11_MODULE(performer_probes, module) {
  module.doc() = "The wrappers of PTX, on a GPU or emulated, on numbers in host memory.";
  module.attr("EMULATED") = performer::probes::kEmulated;
  module.def("names", performer::probes::Names, "The names that `run` knows.");
  module.def(
      "set_tensor_cores",
      [](const std::string& name) {
        performer::bindings::ThrowIfError(performer::probes::SetTensorCores(name));
      },
      "Whose tensor cores the emulator has: H100 or A100. Raises ValueError for another name.");
  module.def(
      "ceilings",
      [] {
        std::map<std::string, double> rates;
        performer::bindings::ThrowIfError(performer::probes::Ceilings(&rates));
        return rates;
      },
      "The rates that single instructions reach on this GPU, by what they are and their unit.");
  module.def("run", performer::Run, pybind11::arg("name"), pybind11::arg("x"),
             "Runs a probe: uint32 [warps, 32, 12] to uint32 [warps, 32, 4].\n"
             "Raises ValueError for a wrong argument, RuntimeError with CUDA's text.");
}
