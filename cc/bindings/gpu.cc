#include "bindings/gpu.h"

#include "bindings/calls.h"
#ifdef PERFORMER_HAVE_CUDA
#include "cuda/devices.h"
#include "cuda/run.h"
#endif

namespace performer {
namespace bindings {
namespace {

#ifdef PERFORMER_HAVE_CUDA

using GivenTensor = std::tuple<uintptr_t, std::vector<int64_t>, std::string>;

py::list Gpus() {
  std::vector<cuda::DeviceInfo> devices;
  ThrowIfError(cuda::ListDevices(&devices));
  py::list list;
  for (const cuda::DeviceInfo& device : devices) {
    py::dict entry;
    entry["name"] = device.name;
    entry["compute_capability"] = py::make_tuple(device.major, device.minor);
    entry["memory"] = device.memory;
    entry["multiprocessors"] = device.multiprocessors;
    list.append(entry);
  }
  return list;
}

// Outputs and workspace are allocated through Python, so that a caller's allocator owns every byte.
py::dict RunOnGpu(const std::string& name, const std::map<std::string, GivenTensor>& given,
                  const py::function& make_output, const py::function& allocate, uintptr_t stream,
                  const py::kwargs& attributes) {
  const Op op = FindOp(name);
  const auto find = [&](const char* argument) {
    const auto found = given.find(argument);
    if (found == given.end())
      throw py::value_error(std::string("inputs must have '") + argument + "'");
    Tensor tensor;
    tensor.data = reinterpret_cast<const void*>(std::get<0>(found->second));
    tensor.shape.dims = std::get<1>(found->second);
    tensor.dtype = std::get<2>(found->second);
    return tensor;
  };
  std::vector<Shape> output_shapes;
  Call call = CheckedCall(op, TakeAttributes(attributes), find, &output_shapes);
  ThrowIfError(cuda::Supports(call.dtype, call.dims));
  const Signature& signature = SignatureOf(op);
  py::dict results;
  for (size_t i = 0; i < signature.outputs.size(); ++i) {
    const Argument& output = signature.outputs[i];
    const py::tuple made =
        make_output(py::tuple(py::cast(output_shapes[i].dims)), TypeName(call.dtype, output.type));
    results[output.name] = made[0];
    call.outputs.push_back(reinterpret_cast<void*>(made[1].cast<uintptr_t>()));
  }
  cuda::Device device;
  device.stream = reinterpret_cast<void*>(stream);
  device.allocate = [&](size_t bytes) {
    return reinterpret_cast<void*>(allocate(bytes).cast<uintptr_t>());
  };
  ThrowIfError(cuda::Run(op, call, device));
  return results;
}

#endif

}  // namespace

void DefineGpu(py::module_& module) {
#ifdef PERFORMER_HAVE_CUDA
  using py::arg;
  module.attr("HAS_GPU_KERNELS") = true;
  module.def("gpus", Gpus,
             "The GPUs of this machine, a dict for each. Raises RuntimeError, with CUDA's own "
             "text, where there is no driver or no device.");
  module.def(
      "run_on_gpu", RunOnGpu, arg("op"), arg("inputs"), arg("make_output"), arg("allocate"),
      py::kw_only(), arg("stream"),
      "Enqueues one operator on a stream of the current GPU; returns without waiting.\n\n"
      "inputs: by name (address, shape, dtype), contiguous, in the memory of the GPU; \"offsets\" "
      "and \"start\" in that of the host. make_output(shape, dtype) gives (object, address) for "
      "each output; "
      "the objects are returned by name. allocate(bytes) gives the address of workspace, aligned "
      "to 16, that lives until the stream has passed the call, or 0. stream: the address of a "
      "CUstream, or 0 for the default stream. Other keyword arguments are the attributes, as in "
      "`run`. The addresses are trusted.\n"
      "Raises ValueError for a wrong argument, MemoryError, and RuntimeError with CUDA's text.");
#else
  module.attr("HAS_GPU_KERNELS") = false;
#endif
}

}  // namespace bindings
}  // namespace performer
