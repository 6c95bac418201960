// What the launchers of all operators prepare from the parameters of a call: tensors, feature map,
// division into work tiles, packed operands.
#pragma once
#include <cmath>

#include "cuda/host/launch.h"
#include "cuda/kernels/forward/pack.cuh"

namespace performer {
namespace cuda {

inline bool IsAligned(const void* data, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_bytes % 16 == 0;
}
template <class T>
RowsOf<const T> InputRows(const void* data, int64_t heads, int64_t width) {
  return {static_cast<const T*>(data), heads, static_cast<int>(width),
          static_cast<int>(heads * width),
          IsAligned(data, width * static_cast<int64_t>(sizeof(T)))};
}
template <class T>
RowsOf<T> OutputRows(void* data, int64_t heads, int64_t width) {
  return {static_cast<T*>(data), heads, static_cast<int>(width), static_cast<int>(heads * width),
          IsAligned(data, width * static_cast<int64_t>(sizeof(T)))};
}

template <class T>
KeyParams<T> MakeKeyParams(const Common& call, const KeySide& keys) {
  KeyParams<T> params;
  params.key = InputRows<T>(keys.key, call.dims.groups, call.dims.key_dim);
  params.value = InputRows<T>(keys.value, call.dims.groups, call.dims.value_dim);
  params.packed = call.offsets != nullptr;
  params.bias = {static_cast<const float*>(keys.bias),
                 keys.bias_batch == 1 ? 0 : keys.bias_heads * keys.bias_length,
                 keys.bias_heads == 1 ? 0 : keys.bias_length, keys.bias_length == 1 ? 0 : 1};
  return params;
}

inline Map MakeMap(const Common& call) {
  const Attributes& attributes = call.attributes;
  const double root = std::sqrt(attributes.ResolvedScale(call.dims.key_dim));
  return {attributes.feature_map,
          attributes.key_norm && attributes.feature_map == FeatureMap::kSoftmax,
          static_cast<float>(root), static_cast<float>(1 / root),
          static_cast<float>(attributes.feature_epsilon)};
}

// The work tiles of a call.
struct Division {
  WorkTiles tiles;
  int64_t count = 0, most = 0;  // of all sequences; of the one with most
  bool some_empty = false;      // there are sequences without rows
};

template <class T>
class Operands {
 public:
  Operands(const Common& call, const Device& device)
      : call_(call),
        dims_(call.dims),
        launcher_(device),
        map_(MakeMap(call)),
        features_pad_(RoundUp(call.dims.features, kFeatureUnit)) {}

 protected:
  bool packed() const { return call_.offsets != nullptr; }

  // Work tiles of `unit` rows over the sequences, of `rows` rows each if they are not packed.
  Status Divide(int64_t rows, int64_t unit, Division* division) const {
    WorkTiles& tiles = division->tiles;
    tiles.sequences = dims_.sequences;
    tiles.rows = rows;
    tiles.unit = unit;
    if (!packed()) {
      division->most = WorkTileCount(tiles, 0);
      division->count = dims_.sequences * division->most;
      division->some_empty = rows == 0;
      return Status();
    }
    const size_t ends = static_cast<size_t>(dims_.sequences) + 1;
    std::vector<int64_t> numbers(call_.offsets, call_.offsets + ends);  // then the first tiles
    numbers.push_back(0);
    for (size_t n = 0; n + 1 < ends; ++n) {
      const int64_t length = numbers[n + 1] - numbers[n];
      const int64_t count = CeilDiv(length, WorkTileRows(tiles, length));
      numbers.push_back(numbers.back() + count);
      division->most = count > division->most ? count : division->most;
      division->some_empty |= count == 0;
    }
    division->count = numbers.back();
    PERFORMER_RETURN_IF_ERROR(launcher_.Upload(numbers, &tiles.offsets));
    tiles.first = tiles.offsets + ends;
    return Status();
  }

  // float32 matrices [matrices, rows, width] as operands [matrices, rows_pad, W]; see forward/pack.cuh.
  template <int W>
  Status Pack(const char* purpose, const void* from, const float* log_mass, int64_t matrices,
              int64_t width, const T** to) const {
    T* packed = nullptr;
    PERFORMER_RETURN_IF_ERROR(launcher_.Allocate(matrices * features_pad_ * W, purpose, &packed));
    *to = packed;
    const PackParams params = {
        static_cast<const float*>(from), log_mass, packed, matrices, dims_.features, features_pad_,
        static_cast<int>(width)};
    constexpr int kThreads = 256;
    const Grid grid = {CeilDiv(matrices * features_pad_ * 32, kThreads)};
    return launcher_.Launch(purpose, PackKernel<T, W>, grid, kThreads, 0, params);
  }
  // Projections as A operands in registers' order (forward/pack.cuh).
  template <int W>
  Status PackOperands(const void* from, int64_t heads, const uint32_t** to) const {
    uint32_t* packed = nullptr;
    const int64_t registers = heads * features_pad_ * W * static_cast<int64_t>(sizeof(T)) / 4;
    PERFORMER_RETURN_IF_ERROR(launcher_.Allocate(registers, "the packed projection", &packed));
    *to = packed;
    const PackParams params = {
        static_cast<const float*>(from), nullptr, packed, heads, dims_.features, features_pad_,
        static_cast<int>(dims_.key_dim)};
    constexpr int kThreads = 256;
    return launcher_.Launch("packing a projection", PackOperandsKernel<T, W>,
                            {CeilDiv(registers, kThreads)}, kThreads, 0, params);
  }
  template <int W>
  Status PackProjection(const void* from, int64_t heads, Projection<T>* to) const {
    to->heads = heads;
    return Pack<W>("the packed projection", from, nullptr, heads, dims_.key_dim, &to->data);
  }

  const Common& call_;
  const Dims& dims_;
  const Launcher launcher_;
  const Map map_;
  const int64_t features_pad_;
};

}  // namespace cuda
}  // namespace performer
