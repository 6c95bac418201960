// What all launchers are given: one Context, filled once for a call. It also fills the parameters
// that kernels share.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "cuda/host/launch.h"

namespace performer {
namespace cuda {

// Threads of a block in the kernels that give a thread or a warp to each result.
inline constexpr int kElementwiseThreads = 256;

// A contiguous tensor [rows, heads, width]. T is const for an input.
template <class T, class Data>
RowsOf<T> MakeRows(Data* data, int64_t heads, int64_t width) {
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T));
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_bytes % 16 == 0;
  return {static_cast<T*>(data), heads, static_cast<int>(width), static_cast<int>(heads * width),
          aligned};
}

inline Map MakeMap(const Attributes& attributes, int64_t key_dim) {
  const double root = std::sqrt(attributes.ResolvedScale(key_dim));
  return {attributes.feature_map,
          attributes.key_norm && attributes.feature_map == FeatureMap::kSoftmax,
          static_cast<float>(root), static_cast<float>(1 / root),
          static_cast<float>(attributes.feature_epsilon)};
}

// The work tiles of a call.
struct Division {
  WorkTiles tiles;
  int64_t count = 0;        // of all sequences
  int64_t max_count = 0;    // of the sequence that has most
  bool some_empty = false;  // whether there are sequences without rows
};

struct Context {
  Context(const Common& call, const Device& device)
      : dims(call.dims),
        offsets(call.offsets),
        launcher(device),
        map(MakeMap(call.attributes, call.dims.key_dim)),
        features_pad(RoundUp(call.dims.features, kFeatureUnit)) {}

  const Dims dims;
  const int64_t* const offsets;  // [N + 1] of packed sequences, host memory; else nullptr
  const Launcher launcher;
  const Map map;
  const int64_t features_pad;  // M in units of kFeatureUnit

  bool packed() const { return offsets != nullptr; }

  // Divides the sequences, of `rows` each if they are not packed, into tiles of `unit` rows.
  // `multiple`: see WorkTiles.
  Status Divide(int64_t rows, int64_t unit, Division* division, int64_t multiple = 1) const {
    WorkTiles& tiles = division->tiles;
    tiles.sequences = dims.sequences;
    tiles.rows = rows;
    tiles.unit = unit;
    tiles.multiple = multiple;
    if (!packed()) {
      division->max_count = WorkTileCount(tiles, 0);
      division->count = dims.sequences * division->max_count;
      division->some_empty = rows == 0;
      return Status();
    }
    const size_t ends = static_cast<size_t>(dims.sequences) + 1;
    std::vector<int64_t> numbers(offsets, offsets + ends);  // then the first tile of each sequence
    numbers.push_back(0);
    for (size_t n = 0; n + 1 < ends; ++n) {
      const int64_t length = numbers[n + 1] - numbers[n];
      const int64_t count = CeilDiv(length, WorkTileRows(tiles, length));
      numbers.push_back(numbers.back() + count);
      division->max_count = count > division->max_count ? count : division->max_count;
      division->some_empty |= count == 0;
    }
    division->count = numbers.back();
    PERFORMER_RETURN_IF_ERROR(launcher.Upload(numbers, &tiles.offsets));
    tiles.first = tiles.offsets + ends;
    return Status();
  }

  void Fill(const Division& division, CallParams* params) const {
    params->map = map;
    params->work = division.tiles;
    params->groups = dims.groups;
    params->features = dims.features;
    params->features_pad = features_pad;
  }

  template <class T>
  void FillQueries(const QuerySide& queries, const Division& division,
                   QueryParams<T>* params) const {
    Fill(division, params);
    params->query = MakeRows<const T>(queries.query, dims.heads, dims.key_dim);
    params->feature_bias = static_cast<const float*>(queries.feature_bias);
    params->feature_bias_heads = queries.feature_bias_heads;
  }

  template <class T>
  void FillKeys(const KeySide& keys, KeyParams<T>* params) const {
    params->key = MakeRows<const T>(keys.key, dims.groups, dims.key_dim);
    params->value = MakeRows<const T>(keys.value, dims.groups, dims.value_dim);
    params->packed = packed();
    params->bias = {static_cast<const float*>(keys.bias),
                    keys.bias_batch == 1 ? 0 : keys.bias_heads * keys.bias_length,
                    keys.bias_heads == 1 ? 0 : keys.bias_length, keys.bias_length == 1 ? 0 : 1};
  }
};

// run(std::integral_constant<int, W>) with the width of tiles' rows, to which D and E are padded.
inline constexpr int kNarrow = 64, kWide = kMaxFloat32HeadWidth, kWidest = kMaxHeadWidth;
template <class T, class Run>
Status WithWidth(const Dims& dims, Run run) {
  const int64_t width = std::max(dims.key_dim, dims.value_dim);
  if (width <= kNarrow) return run(std::integral_constant<int, kNarrow>());
  if constexpr (kIs16Bit<T>)
    if (width > kWide) return run(std::integral_constant<int, kWidest>());
  return run(std::integral_constant<int, kWide>());
}

}  // namespace cuda
}  // namespace performer
