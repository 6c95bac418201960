// What single instructions reach on this GPU: the rates that the kernels' times are compared with.
#include <map>
#include <memory>
#include <string>
#include <type_traits>

#include "cuda/device/ptx.h"
#include "cuda/errors.h"
#include "gpu/probes.h"

namespace performer {
namespace probes {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kAtOnce = 8, kRounds = 2000;

// Eight independent sums of a warp, so that none waits for another.
template <class T>
__global__ void MmaCeiling(uint32_t* out) {
  float d[kAtOnce][4] = {};
  uint32_t a[4] = {threadIdx.x, 1, 2, 3};
  for (int round = 0; round < kRounds; ++round)
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if constexpr (std::is_same_v<T, float>)
        cuda::MmaTf32M16N8K8(d[i], a, 0, threadIdx.x);
      else
        cuda::MmaM16N8K16<T>(d[i], a, 0, threadIdx.x);
  float sum = 0;
  for (int i = 0; i < kAtOnce; ++i) sum += d[i][0] + d[i][1] + d[i][2] + d[i][3];
  out[blockIdx.x * kThreads + threadIdx.x] = cuda::AsBits(sum);
}

__global__ void LdMatrixCeiling(uint32_t* out) {
  PERFORMER_SHARED_MEMORY(shared);
  auto* const words = reinterpret_cast<uint32_t*>(shared);
  for (int i = threadIdx.x; i < kAtOnce * kThreads * 4; i += kThreads) words[i] = i;
  __syncthreads();
  uint32_t sum = 0;
  for (int round = 0; round < kRounds; ++round)
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      uint32_t r[4];
      cuda::LdMatrixX4(r, words + (i * kThreads + threadIdx.x) * 4);
      sum ^= r[0] ^ r[1] ^ r[2] ^ r[3];
    }
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

__global__ void Exp2Ceiling(uint32_t* out) {
  float x[kAtOnce];
  for (int i = 0; i < kAtOnce; ++i) x[i] = static_cast<float>(threadIdx.x + i) * -0x1p-10f;
  for (int round = 0; round < kRounds; ++round)
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) x[i] = cuda::Exp2(x[i]);
  float sum = 0;
  for (int i = 0; i < kAtOnce; ++i) sum += x[i];
  out[blockIdx.x * kThreads + threadIdx.x] = cuda::AsBits(sum);
}

struct Events {
  cudaEvent_t begin = nullptr, end = nullptr;
  ~Events() {
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
  }
};

// Seconds of the second of two launches.
Status Seconds(void (*kernel)(uint32_t*), int blocks, int shared_bytes, uint32_t* out,
               double* seconds) {
  Events events;
  for (cudaEvent_t* event : {&events.begin, &events.end})
    PERFORMER_RETURN_IF_ERROR(cuda::ToStatus(cudaEventCreate(event), "an event"));
  for (int i = 0; i < 2; ++i) {
    cudaEventRecord(events.begin);
    kernel<<<blocks, kThreads, shared_bytes>>>(out);
    PERFORMER_RETURN_IF_ERROR(cuda::ToStatus(cudaGetLastError(), "launching a ceiling"));
    cudaEventRecord(events.end);
    PERFORMER_RETURN_IF_ERROR(cuda::ToStatus(cudaEventSynchronize(events.end), "a ceiling"));
  }
  float milliseconds = 0;
  PERFORMER_RETURN_IF_ERROR(cuda::ToStatus(
      cudaEventElapsedTime(&milliseconds, events.begin, events.end), "the time of a ceiling"));
  *seconds = milliseconds * 1e-3;
  return Status();
}

struct DeviceFree {
  void operator()(uint32_t* p) const { cudaFree(p); }
};

}  // namespace

Status Ceilings(std::map<std::string, double>* rates) {
  int device = 0, multiprocessors = 0;
  PERFORMER_RETURN_IF_ERROR(cuda::ToStatus(cudaGetDevice(&device), "the device"));
  PERFORMER_RETURN_IF_ERROR(cuda::ToStatus(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
      "the number of multiprocessors"));
  const int blocks = 4 * multiprocessors;
  void* memory = nullptr;
  PERFORMER_RETURN_IF_ERROR(
      cuda::ToStatus(cudaMalloc(&memory, sizeof(uint32_t) * blocks * kThreads), "memory"));
  const std::unique_ptr<uint32_t, DeviceFree> out(static_cast<uint32_t*>(memory));
  // Each with what one instruction of a warp does, in the unit of the rate.
  const struct {
    const char* name;
    void (*kernel)(uint32_t*);
    int shared_bytes;
    double work;
  } ceilings[] = {
      {"mma.m16n8k16 bfloat16, TFLOP/s", MmaCeiling<cuda::BFloat16>, 0, 2 * 16 * 8 * 16},
      {"mma.m16n8k16 half, TFLOP/s", MmaCeiling<cuda::Half>, 0, 2 * 16 * 8 * 16},
      {"mma.m16n8k8 tf32, TFLOP/s", MmaCeiling<float>, 0, 2 * 16 * 8 * 8},
      {"ldmatrix.x4, TB/s", LdMatrixCeiling, kAtOnce * kThreads * 16, 512},
      {"ex2, T/s", Exp2Ceiling, 0, 32},
  };
  for (const auto& ceiling : ceilings) {
    double seconds = 0;
    PERFORMER_RETURN_IF_ERROR(
        Seconds(ceiling.kernel, blocks, ceiling.shared_bytes, out.get(), &seconds));
    (*rates)[ceiling.name] = ceiling.work * kAtOnce * kRounds * kWarps * blocks / seconds * 1e-12;
  }
  return Status();
}

}  // namespace probes
}  // namespace performer
