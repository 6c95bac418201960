// Small kernels with a mistake that can be planted, which the emulator must find.
#pragma once
#include "cuda/device/ptx.h"

namespace performer {
namespace planted {

struct Params {
  const float* x = nullptr;  // [10 * threads]
  float* out = nullptr;      // [4 * blocks * threads]
  bool bug = false;
};

// Shared memory, a barrier between a write and the reads of others.
static __global__ void MissingBarrier(Params p) {
  PERFORMER_SHARED_MEMORY(shared);
  float* s = reinterpret_cast<float*>(shared);
  s[threadIdx.x] = p.x[threadIdx.x];
  if (!p.bug) __syncthreads();
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = s[(threadIdx.x + 32) % blockDim.x];
}

// The buffer is written again while others still read it.
static __global__ void ReusedBuffer(Params p) {
  PERFORMER_SHARED_MEMORY(shared);
  float* s = reinterpret_cast<float*>(shared);
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    s[threadIdx.x] = p.x[4 * threadIdx.x + i];
    __syncthreads();
    sum += s[(threadIdx.x + 32) % blockDim.x];
    if (!p.bug) __syncthreads();
  }
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// Lanes exchange through shared memory: a shuffle in between orders registers only.
static __global__ void MissingSyncWarp(Params p) {
  PERFORMER_SHARED_MEMORY(shared);
  float* s = reinterpret_cast<float*>(shared);
  s[threadIdx.x] = p.x[threadIdx.x];
  if (!p.bug) __syncwarp();
  const float one = __shfl_xor_sync(0xffffffffu, 1.f, 1);
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = one * s[threadIdx.x ^ 1];
}

// Reads what cp.async brings before it waits.
static __global__ void MissingWait(Params p) {
  PERFORMER_SHARED_MEMORY(shared);
  float* s = reinterpret_cast<float*>(shared);
  cuda::CpAsync16(s + 4 * threadIdx.x, p.x + 4 * threadIdx.x, true);
  cuda::CpAsyncCommit();
  if (!p.bug) cuda::CpAsyncWait<0>();
  const float own = s[4 * threadIdx.x];
  cuda::CpAsyncWait<0>();
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = own;
}

static __global__ void DivergentBarrier(Params p) {
  if (!p.bug || threadIdx.x < 40) __syncthreads();
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
}

static __global__ void DivergentShuffle(Params p) {
  float x = p.x[threadIdx.x];
  if (!p.bug || threadIdx.x % 32 < 16) x += __shfl_xor_sync(0xffffffffu, x, 1);
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = x;
}

// Two blocks write one number.
static __global__ void BlocksRace(Params p) {
  p.out[(p.bug ? 0 : blockIdx.x * blockDim.x) + threadIdx.x] = p.x[threadIdx.x];
}

static __global__ void Misaligned(Params p) {
  PERFORMER_SHARED_MEMORY(shared);
  uint32_t r[4];
  cuda::CpAsync16(shared + 16 * threadIdx.x, p.x + 4 * threadIdx.x, true);
  cuda::CpAsyncCommit();
  cuda::CpAsyncWait<0>();
  __syncthreads();
  cuda::LdMatrixX4(r, shared + 16 * (threadIdx.x % 32) + (p.bug && threadIdx.x == 3 ? 2 : 0));
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = cuda::AsFloat(r[0]);
}

// Rows of matrices 128 bytes apart: all in the same banks.
static __global__ void BankConflicts(Params p) {
  PERFORMER_SHARED_MEMORY(shared);
  uint32_t r[4];
  const int row = threadIdx.x % 32;
  cuda::LdMatrixX4(r, shared + (p.bug ? 128 * (row % 8) : 16 * row));
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = cuda::AsFloat(r[0] & 0);
}

// One number behind the end of shared memory (for AddressSanitizer).
static __global__ void OutOfBounds(Params p) {
  PERFORMER_SHARED_MEMORY(shared);
  float* s = reinterpret_cast<float*>(shared);
  s[threadIdx.x + (p.bug ? 4 * blockDim.x : 0)] = 1;
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = s[threadIdx.x];
}

// Numbers behind the end of the output.
static __global__ void BehindOutput(Params p) {
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  if (p.bug && blockIdx.x == 0) p.out[4 * gridDim.x * blockDim.x + threadIdx.x] = 1;
}

// Numbers before the output.
static __global__ void BeforeOutput(Params p) {
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  if (p.bug && blockIdx.x == 0) p.out[-1 - static_cast<int>(threadIdx.x)] = 1;
}

// One product d [16][8] += a b of a warp, every lane's registers given: x holds them lane by lane,
// a (4), b (2) and d (4); out receives d.
template <void (*kMma)(float (&)[4], const uint32_t*, uint32_t, uint32_t)>
static __global__ void OneMma(Params p) {
  const float* x = p.x + 10 * threadIdx.x;
  uint32_t a[4];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = cuda::AsBits(x[i]), d[i] = x[6 + i];
  kMma(d, a, cuda::AsBits(x[4]), cuda::AsBits(x[5]));
  for (int i = 0; i < 4; ++i) p.out[4 * threadIdx.x + i] = d[i];
}

// ldmatrix: x holds 32 rows of 16 bytes, out receives each lane's registers.
template <bool kTrans>
static __global__ void OneLdMatrix(Params p) {
  PERFORMER_SHARED_MEMORY(shared);
  float* s = reinterpret_cast<float*>(shared);
  for (int i = 0; i < 4; ++i) s[4 * threadIdx.x + i] = p.x[4 * threadIdx.x + i];
  __syncwarp();
  uint32_t r[4];
  kTrans ? cuda::LdMatrixX4Trans(r, s + 4 * threadIdx.x) : cuda::LdMatrixX4(r, s + 4 * threadIdx.x);
  for (int i = 0; i < 4; ++i) p.out[4 * threadIdx.x + i] = cuda::AsFloat(r[i]);
}

}  // namespace planted
}  // namespace performer
