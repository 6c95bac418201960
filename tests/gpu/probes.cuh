// One small kernel for every wrapper of cuda/device/ptx.h that holds PTX. It applies the wrapper to
// numbers that a test gives. The same source runs on a GPU and under the emulator, where it tests
// the host twin.
#pragma once
#include "cuda/device/ptx.h"

namespace performer {
namespace probes {

using cuda::AsBits;
using cuda::AsFloat;

// Words of a lane: what it is given and what it returns.
inline constexpr int kIn = 12, kOut = 4;

struct Params {
  const uint32_t* in = nullptr;  // [warps, 32, kIn]
  uint32_t* out = nullptr;       // [warps, 32, kOut]
};

// One block is one warp.
struct Lane {
  const uint32_t* in;
  uint32_t* out;
  PERFORMER_DEVICE explicit Lane(const Params& p)
      : in(p.in + (static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x) * kIn),
        out(p.out + (static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x) * kOut) {}
};

// in: a (4), b (2), d (4); out: d.
template <void (*kMma)(float (&)[4], const uint32_t*, uint32_t, uint32_t)>
static __global__ void MmaProbe(Params p) {
  const Lane lane(p);
  uint32_t a[4];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = lane.in[i], d[i] = AsFloat(lane.in[6 + i]);
  kMma(d, a, lane.in[4], lane.in[5]);
  for (int i = 0; i < 4; ++i) lane.out[i] = AsBits(d[i]);
}

// in: a row of 16 bytes (4); out: the lane's registers.
template <bool kTrans>
static __global__ void LdMatrixProbe(Params p) {
  PERFORMER_SHARED_MEMORY(shared);
  const Lane lane(p);
  auto* row = reinterpret_cast<uint32_t*>(shared) + 4 * threadIdx.x;
  for (int i = 0; i < 4; ++i) row[i] = lane.in[i];
  __syncwarp();
  uint32_t r[4];
  kTrans ? cuda::LdMatrixX4Trans(r, row) : cuda::LdMatrixX4(r, row);
  for (int i = 0; i < 4; ++i) lane.out[i] = r[i];
}

// Two groups of copies, of words 0-3 and 4-7; each lane reads what its neighbour copied. in[8]:
// whether the first copy is valid. out: word 0 of the first after a wait that leaves one group in
// flight, word 3 of it, and the same of the second after all have arrived.
static __global__ void CpAsyncProbe(Params p) {
  PERFORMER_SHARED_MEMORY(shared);
  const Lane lane(p);
  auto* first = reinterpret_cast<uint32_t*>(shared);
  uint32_t* second = first + 4 * 32;
  for (int i = 0; i < 4; ++i) first[4 * threadIdx.x + i] = second[4 * threadIdx.x + i] = ~0u;
  cuda::CpAsync16(first + 4 * threadIdx.x, lane.in, lane.in[8] != 0);
  cuda::CpAsyncCommit();
  cuda::CpAsync16(second + 4 * threadIdx.x, lane.in + 4, true);
  cuda::CpAsyncCommit();
  const int other = threadIdx.x ^ 1;
  cuda::CpAsyncWait<1>();
  __syncwarp();
  lane.out[0] = first[4 * other];
  lane.out[1] = first[4 * other + 3];
  cuda::CpAsyncWait<0>();
  __syncwarp();
  lane.out[2] = second[4 * other];
  lane.out[3] = second[4 * other + 3];
}

static __global__ void OpaqueProbe(Params p) {
  const Lane lane(p);
  for (int i = 0; i < kOut; ++i)
    lane.out[i] = static_cast<uint32_t>(cuda::Opaque(static_cast<int>(lane.in[i])));
}

template <float (*kFunction)(float)>
static __global__ void FloatProbe(Params p) {
  const Lane lane(p);
  for (int i = 0; i < kOut; ++i) lane.out[i] = AsBits(kFunction(AsFloat(lane.in[i])));
}

// out: words 0 and 1 packed as low and high, and both again from the pair; word 0 alone.
template <class T>
static __global__ void PackProbe(Params p) {
  const Lane lane(p);
  const uint32_t pair = cuda::Pack<T>(AsFloat(lane.in[0]), AsFloat(lane.in[1]));
  lane.out[0] = pair;
  lane.out[1] = AsBits(cuda::Low<T>(pair));
  lane.out[2] = AsBits(cuda::High<T>(pair));
  lane.out[3] = cuda::FromFloat<T>(AsFloat(lane.in[0])).bits;
}

static __global__ void HalfToFloatProbe(Params p) {
  const Lane lane(p);
  for (int i = 0; i < kOut; ++i)
    lane.out[i] = AsBits(cuda::HalfToFloat(static_cast<uint16_t>(lane.in[i])));
}

static __global__ void ToTf32Probe(Params p) {
  const Lane lane(p);
  for (int i = 0; i < kOut; ++i) lane.out[i] = cuda::ToTf32(AsFloat(lane.in[i]));
}

}  // namespace probes
}  // namespace performer
