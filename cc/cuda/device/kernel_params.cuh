// Kernel parameters that several kernels share: what the core's parameters (core/params.h) say, in
// the form in which a block uses it. Plain data, prepared by the launchers (host/context.h).
#pragma once
#include "core/attributes.h"
#include "cuda/device/mma_tile.cuh"
#include "cuda/host/schedule.h"

namespace performer {
namespace cuda {

// A tensor [rows, heads, width] whose rows (of one head) are copied into tiles.
template <class T>
struct RowsOf {
  T* data = nullptr;  // [rows, heads, width]
  int64_t heads = 0;
  int width = 0;
  int stride = 0;        // heads * width
  bool aligned = false;  // rows and base to 16 bytes: copied by cp.async, else number by number

  PERFORMER_DEVICE T* Row(int64_t row, int64_t head) const {
    return data + row * stride + head * width;
  }
};

// The feature map. Log-features are kept in units of `root` (log phi = root * logit), so that the
// projection needs no factor, which would round it a second time.
struct Map {
  FeatureMap kind = FeatureMap::kSoftmax;
  bool key_norm = false;
  float root = 1;  // square root of the scale
  float inverse_root = 1;
  float epsilon = 0;

  PERFORMER_HOST_DEVICE bool linear() const { return kind == FeatureMap::kSoftmax; }
  // 2^(unit * logit) is the feature.
  PERFORMER_HOST_DEVICE float unit() const { return root * kLog2e; }
};

// key_bias [1|B, 1|G, 1|S].
struct KeyBias {
  const float* data = nullptr;            // [1|B, 1|G, 1|S]
  int64_t batch_step = 0, head_step = 0;  // 0: the same for all
  int step = 0;                           // along the keys, 0 or 1
};

// Keys and values.
template <class T>
struct KeyParams {
  RowsOf<const T> key, value;
  KeyBias bias;
  bool packed = false;
};

// Projections in T, padded with zeros to [heads][m_pad][W]; m_pad is a multiple of kFeatureUnit.
inline constexpr int kFeatureUnit = 64;
template <class T>
struct Projection {
  const T* data = nullptr;  // [heads, m_pad, W]
  int64_t heads = 0;
  PERFORMER_DEVICE const T* At(int64_t head, int64_t m_pad, int width) const {
    return data + head * m_pad * width;
  }
};

// What every kernel that walks the rows of a call is given: filled by Context (host/context.h).
struct CallParams {
  Map map;
  WorkTiles work;                                      // blockIdx.x is the number of a tile
  int64_t groups = 0, features = 0, features_pad = 0;  // G, M, and M in units of kFeatureUnit
};

// Of a kernel that reads queries.
template <class T>
struct QueryParams : CallParams {
  RowsOf<const T> query;                // [B L, H, D]
  const float* feature_bias = nullptr;  // [feature_bias_heads, M]
  int64_t feature_bias_heads = 0;       // 1, G or H
};

// Of a kernel whose queries read a state.
template <class T>
struct StateReadParams : QueryParams<T> {
  Projection<T> projection;         // of queries
  const T* mean = nullptr;          // [state_count, G, M_pad, W]: the operand
  const float* log_mass = nullptr;  // [state_count, G, M]
  int64_t state_count = 0;          // N, or 1: the same for all sequences
};

// Of a kernel that reads keys and values, and no queries.
template <class T>
struct KeyReadParams : CallParams {
  KeyParams<T> keys;
  Projection<T> projection;  // of keys
};

// log phi in units of root, from the product x = w . k (kRelu, kElu).
PERFORMER_DEVICE float MappedLogit(const Map& map, float x) {
  const float u = map.root * x;
  const bool relu = map.kind == FeatureMap::kRelu;
  // In this order NaN stays NaN.
  const float phi = relu ? (u < 0.f ? 0.f : u) + map.epsilon : 1.f + u;
  const float log_phi = relu || u > 0.f ? Log2(phi) * kLn2 : u;
  return log_phi * map.inverse_root;
}
// x = log phi of the products x, plus the bias of each column, for columns 8 n + 2 t + c of a row
// tile.
template <int kColumnTiles>
PERFORMER_DEVICE void MapLogits(float (&x)[kColumnTiles][4], const Map& map, const float* bias,
                                int t) {
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) x[n][i] = MappedLogit(map, x[n][i]) + bias[n * 8 + 2 * t + (i & 1)];
}

}  // namespace cuda
}  // namespace performer
