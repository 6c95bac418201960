#include <cstring>
#include <map>

#include "gpu/probes.cuh"
#include "gpu/probes.h"
#if defined(__CUDACC__)
#include "cuda/errors.h"
#else
#include "sim/emulator.h"
#endif

namespace performer {
namespace probes {
namespace {

using Kernel = void (*)(Params);

const std::map<std::string, Kernel>& Kernels() {
  static const std::map<std::string, Kernel> kernels = {
      {"MmaM16N8K16<BFloat16>", MmaProbe<cuda::MmaM16N8K16<cuda::BFloat16>>},
      {"MmaM16N8K16<Half>", MmaProbe<cuda::MmaM16N8K16<cuda::Half>>},
      {"MmaTf32M16N8K8", MmaProbe<cuda::MmaTf32M16N8K8>},
      {"LdMatrixX4", LdMatrixProbe<false>},
      {"LdMatrixX4Trans", LdMatrixProbe<true>},
      {"CpAsync", CpAsyncProbe},
      {"Opaque", OpaqueProbe},
      {"Exp2", FloatProbe<cuda::Exp2>},
      {"Log2", FloatProbe<cuda::Log2>},
      {"Pack<BFloat16>", PackProbe<cuda::BFloat16>},
      {"Pack<Half>", PackProbe<cuda::Half>},
      {"HalfToFloat", HalfToFloatProbe},
      {"ToTf32", ToTf32Probe},
  };
  return kernels;
}

constexpr int kSharedBytes = 32 * 32;

#if defined(__CUDACC__)

// Memory of the device that frees itself.
class Memory {
 public:
  ~Memory() { cudaFree(data_); }
  Status Allocate(size_t bytes) {
    return cuda::ToStatus(cudaMalloc(&data_, bytes), "memory for a probe");
  }
  uint32_t* words() const { return static_cast<uint32_t*>(data_); }

 private:
  void* data_ = nullptr;
};

Status Launch(Kernel kernel, int64_t warps, const uint32_t* in, std::vector<uint32_t>* out) {
  const size_t in_bytes = static_cast<size_t>(warps) * 32 * kIn * 4, out_bytes = out->size() * 4;
  Memory given, result;
  PERFORMER_RETURN_IF_ERROR(given.Allocate(in_bytes));
  PERFORMER_RETURN_IF_ERROR(result.Allocate(out_bytes));
  PERFORMER_RETURN_IF_ERROR(
      cuda::ToStatus(cudaMemcpy(given.words(), in, in_bytes, cudaMemcpyHostToDevice), "copying"));
  kernel<<<static_cast<unsigned>(warps), 32, kSharedBytes>>>({given.words(), result.words()});
  PERFORMER_RETURN_IF_ERROR(cuda::ToStatus(cudaGetLastError(), "launching a probe"));
  return cuda::ToStatus(cudaMemcpy(out->data(), result.words(), out_bytes, cudaMemcpyDeviceToHost),
                        "a probe");
}

#else

Status Launch(Kernel kernel, int64_t warps, const uint32_t* in, std::vector<uint32_t>* out) {
  // Aligned as memory of a GPU is.
  std::vector<uint32_t> copy(static_cast<size_t>(warps) * 32 * kIn + 64);
  uint32_t* aligned = copy.data() + (256 - reinterpret_cast<uintptr_t>(copy.data()) % 256) / 4 % 64;
  std::memcpy(aligned, in, static_cast<size_t>(warps) * 32 * kIn * 4);
  const Params params = {aligned, out->data()};
  try {
    sim::Launch("probe", dim3(static_cast<unsigned>(warps)), dim3(32), kSharedBytes,
                [&] { kernel(params); });
  } catch (const sim::Error& error) {
    return Status::Internal(error.what());
  }
  return Status();
}

#endif

}  // namespace

#if defined(__CUDACC__)
const bool kEmulated = false;
#else
const bool kEmulated = true;
Status Ceilings(std::map<std::string, double>*) { return Status(); }
#endif

std::vector<std::string> Names() {
  std::vector<std::string> names;
  for (const auto& entry : Kernels()) names.push_back(entry.first);
  return names;
}

Status SetTensorCores(const std::string& name) {
  if (name != "H100" && name != "A100")
    return Status::InvalidArgument("tensor cores must be H100 or A100; got '" + name + "'");
#if !defined(__CUDACC__)
  sim::TheOptions().tensor_cores =
      name == "H100" ? sim::TensorCores::kH100 : sim::TensorCores::kA100;
#endif
  return Status();
}

Status Run(const std::string& name, int64_t warps, const uint32_t* in, std::vector<uint32_t>* out) {
  const auto found = Kernels().find(name);
  if (found == Kernels().end()) return Status::InvalidArgument("no probe is called '" + name + "'");
  out->assign(static_cast<size_t>(warps) * 32 * kOut, 0xFFFFFFFFu);
  return warps == 0 ? Status() : Launch(found->second, warps, in, out);
}

}  // namespace probes
}  // namespace performer
