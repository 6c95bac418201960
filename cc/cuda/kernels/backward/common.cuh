// What the gradient kernels share. A block walks tiles of 64 tokens, 32 at a time. Its features are
// the rows of all products, and a warp owns 16 kRowTiles of them.
//
//   sums over tokens     gradients of the state and of projections: in registers, each warp has its
//                        rows
//   sums over features   gradients of queries, keys and values: through a tile [feature][token] in
//                        shared memory
//
// If there are more features than a block holds, it takes one feature block after the other, and
// keeps the gradients of rows in float32 in memory until the last one.
#pragma once
#include "cuda/device/row_pipeline.cuh"

namespace performer {
namespace cuda {

// Of query rows, [rows, H], as StoreStatistics leaves them.
struct RowStatistics {
  const float *row_max = nullptr, *log_sum = nullptr, *delta = nullptr;
};

// kWarps_ is 4 or 8: a smaller block serves a small number of features.
template <class T, int W, int kWarps_>
struct BackwardLayout {
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  // Of a warp: sums over tokens, twice 16 kRowTiles x kSlice<W>, fill half of the registers.
  static constexpr int kRowTiles = kIs16Bit<T> && W == 64 ? 2 : 1;
  static constexpr int kFeatures = 16 * kRowTiles * kWarps;
  static constexpr int kMaxBytes = MaxSharedBytes(W, kWarps);
  static constexpr int kStages =
      kIs16Bit<T> && W <= 128 ? 2 : 1;  // of tiles, as shared memory allows
  // Sums over features: 16 tokens of a warp and this many columns, kColumns at a time.
  static constexpr int kWarpColumns = kSlice<W> / (kWarps / 4);
  static constexpr int kColumns = kWarpColumns < 32 ? kWarpColumns : 32;

  static constexpr int kSize = static_cast<int>(sizeof(T));
  static constexpr int kFeatureBytes = kFeatures * W * kSize;     // an operand [kFeatures][W]
  static constexpr int kSummedBytes = kFeatures * kTile * kSize;  // a tile [kFeatures][kTile]
  static constexpr int kTileBytes = kTile * W * kSize;
};
template <class T, int W>
inline constexpr int kBackwardWarps = W * sizeof(T) <= 256 ? 8 : 4;

// A thread's part of a tile of features x tokens. Rows are features row0 + 16 m + g + 8 e of the
// block, columns are tokens 8 n + 2 t + c of kColumns.
// (The compiler of CUDA 12.4 fails on the array as an alias of its own.)
template <int kRowTiles, int kColumns>
struct BackwardTileOf {
  using Array = float[kRowTiles][kColumns / 8][4];
};
template <int kRowTiles, int kColumns = 32>
using BackwardTile = typename BackwardTileOf<kRowTiles, kColumns>::Array;

// x += features (rows) x tokens (kColumns from j0).
template <class T, int W, int kRowTiles, int kColumns = 32>
PERFORMER_DEVICE void FeatureProduct(BackwardTile<kRowTiles, kColumns>& x, const T* features,
                                     int row0, const T* tokens, int j0, int lane) {
#pragma unroll(kUnroll<T>)
  for (int s = 0; s < W / 16; ++s) {
    uint32_t a[kRowTiles][kFragment<T>];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) LoadA<T, W>(a[m], features, row0 + m * 16, s * 16, lane);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t b[kFragment<T>];
      LoadB<T, W>(b, tokens, j0 + n * 16, s * 16, lane);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) Mma<T>(x[m][2 * n], x[m][2 * n + 1], a[m], b);
    }
  }
}

// acc [16 kRowTiles features][kSums columns from c0] += x (kColumns tokens) tokens (rows j0 .. of a
// tile).
template <class T, int W, int kRowTiles, int kColumns = 32, int kSums>
PERFORMER_DEVICE void SumTokens(float (&acc)[kRowTiles][kSums][4],
                                const BackwardTile<kRowTiles, kColumns>& x, const T* tokens, int j0,
                                int c0, int lane) {
#pragma unroll
  for (int s = 0; s < kColumns / 16; ++s) {
    uint32_t a[kRowTiles][kFragment<T>];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) PackA<T>(a[m], x[m][2 * s], x[m][2 * s + 1]);
#pragma unroll
    for (int n = 0; n < kSums / 2; ++n) {
      uint32_t b[kFragment<T>];
      LoadBTrans<T, W>(b, tokens, j0 + s * 16, c0 + n * 16, lane);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) Mma<T>(acc[m][2 * n], acc[m][2 * n + 1], a[m], b);
    }
  }
}

// To a tile [feature][kWidth tokens].
template <class T, int kRowTiles, int kColumns = 32, int kWidth = kTile>
PERFORMER_DEVICE void StoreSummed(T* tile, const BackwardTile<kRowTiles, kColumns>& x, int row0,
                                  int j0, int lane) {
  lane = Opaque(lane);
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        StorePair(tile + At<T, kWidth>(row0 + m * 16 + g + 8 * e, j0 + n * 8 + 2 * t),
                  x[m][n][2 * e], x[m][n][2 * e + 1]);
}

template <class T, int kRowTiles, int kColumns = 32, int kWidth = kTile>
PERFORMER_DEVICE void LoadSummed(BackwardTile<kRowTiles, kColumns>& x, const T* tile, int row0,
                                 int j0, int lane) {
  lane = Opaque(lane);
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float2 y =
            LoadPair(tile + At<T, kWidth>(row0 + m * 16 + g + 8 * e, j0 + n * 8 + 2 * t));
        x[m][n][2 * e] = y.x;
        x[m][n][2 * e + 1] = y.y;
      }
}

// The sum of what an A operand holds of row g + 8 e.
template <class T>
PERFORMER_DEVICE float OperandSum(const uint32_t (&a)[kFragment<T>], int e) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kFragment<T>; ++i)
    if ((i & 1) == e) {
      if constexpr (kIs16Bit<T>)
        sum += Low<T>(a[i]) + High<T>(a[i]);
      else
        sum += AsFloat(a[i]);
    }
  return sum;
}

// acc (16 tokens from r0, kColumns from c0) += x^T y of tiles x [kFeatures][kWidth tokens] and
// y [kFeatures][W]; with kTotal also total[e] += this lane's share of the sum of x over features.
template <class T, int W, int kFeatures, int kColumns, bool kTotal, int kWidth = kTile>
PERFORMER_DEVICE void SumFeatures(float (&acc)[kColumns / 8][4], float (&total)[2], const T* x,
                                  const T* y, int r0, int c0, int lane) {
  lane = Opaque(lane);
#pragma unroll 2
  for (int m = 0; m < kFeatures; m += 16) {
    uint32_t a[kFragment<T>];
    LoadATrans<T, kWidth>(a, x, r0, m, lane);
    if constexpr (kTotal)
#pragma unroll
      for (int e = 0; e < 2; ++e) total[e] += OperandSum<T>(a, e);
#pragma unroll
    for (int c = 0; c < kColumns / 16; ++c) {
      uint32_t b[kFragment<T>];
      LoadBTrans<T, W>(b, y, m, c0 + c * 16, lane);
      Mma<T>(acc[2 * c], acc[2 * c + 1], a, b);
    }
  }
}

// total[e] += this lane's share of the sum over features of a tile [kFeatures][kWidth tokens], of
// tokens r0 + g + 8 e: of what an operand holds, so that its errors cancel where it meets them.
template <class T, int kFeatures, int kWidth = kTile>
PERFORMER_DEVICE void TotalOfFeatures(float (&total)[2], const T* tile, int r0, int lane) {
#pragma unroll 1
  for (int m = 0; m < kFeatures; m += 16) {
    uint32_t a[kFragment<T>];
    LoadATrans<T, kWidth>(a, tile, r0, m, lane);
#pragma unroll
    for (int e = 0; e < 2; ++e) total[e] += OperandSum<T>(a, e);
  }
}

// What a feature of a row is relative to: exp(log-feature - row_max) 2^-log_sum is its weight. In
// 16 bits row_max is the sum of both, as log-features have large rounding errors anyway, and log_sum
// is not kept.
template <class T>
inline constexpr bool kKeepsLogSum = !kIs16Bit<T>;

// Those of the rows from `at` on.
template <class T>
PERFORMER_DEVICE RowStatistics StatisticsFrom(const RowStatistics& from, int64_t at) {
  return {from.row_max + at, kKeepsLogSum<T> ? from.log_sum + at : nullptr, from.delta + at};
}

// Stores them for query row `at`, whose `sum` is relative to row_max; -inf where it is 0.
template <class T>
PERFORMER_DEVICE void StoreStatistics(float row_max, float sum, float unit, int64_t at,
                                      float* to_max, float* to_log_sum) {
  const float log_sum = sum == 0.f ? 0.f : log2f(sum);
  if constexpr (kKeepsLogSum<T>)
    to_log_sum[at] = log_sum;
  else
    row_max += log_sum / unit;
  to_max[at] = sum == 0.f ? -kInfinity : row_max;
}

// Loads row_max, log_sum and delta of query row `at` to row `to` of their tiles. A row past the end,
// or one that sees no key, gets row_max = inf: its features are 0.
template <class T>
PERFORMER_DEVICE void LoadStatistics(float* row_max, float* log_sum, float* delta, int to,
                                     const RowStatistics& from, int64_t at, bool valid) {
  const float given = valid ? from.row_max[at] : -kInfinity;
  row_max[to] = given == -kInfinity ? kInfinity : given;
  if constexpr (kKeepsLogSum<T>) log_sum[to] = valid ? from.log_sum[at] : 0.f;
  delta[to] = valid ? from.delta[at] : 0.f;
}

// The weight of a log-feature, less row_max, in units of root.
template <class T>
PERFORMER_DEVICE float RowWeight(float x, const float* log_sum, int row, float unit) {
  if constexpr (kKeepsLogSum<T>)
    return Exp2(x * unit - log_sum[row]);
  else
    return Exp2(x * unit);
}

// y: two numbers of a row's gradient that is a sum of parts (feature blocks, sub-chunks of a chunk,
// query heads). The same thread keeps them at sums[at] in between. Returns whether y is the whole
// sum now.
PERFORMER_DEVICE bool AddPart(float2& y, float* sums, int64_t at, bool first, bool last) {
  if (first && last) return true;
  float2* const sum = reinterpret_cast<float2*>(sums + at);
  if (!first) y.x += sum->x, y.y += sum->y;
  if (!last) *sum = y;
  return last;
}

// factor y, 16 rows from first_row and kColumns from c0 of the gradient of queries, to the rows of
// one head from `to` on; `sums` [rows, H, W] likewise, see AddPart.
template <class T, int W, int kColumns>
PERFORMER_DEVICE void StoreRowGradient(T* to, const RowsOf<T>& shape, float* sums,
                                       const float (&y)[kColumns / 8][4], float factor,
                                       int first_row, int rows, int c0, bool first, bool last,
                                       int lane) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = first_row + lane / 4 + 8 * e;
    if (row >= rows) continue;
    T* const row_to = to + static_cast<int64_t>(row) * shape.stride;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      const int column = c0 + n * 8 + 2 * (lane % 4);
      float2 x = {y[n][2 * e] * factor, y[n][2 * e + 1] * factor};
      if (AddPart(x, sums, static_cast<int64_t>(row) * static_cast<int>(shape.heads) * W + column,
                  first, last))
        StoreColumns(row_to, column, shape.width, shape.aligned, x.x, x.y);
    }
  }
}

// d log phi / d (root x) of the product x = w . token.
PERFORMER_DEVICE float MapSlope(const Map& map, float x) {
  const float u = map.root * x;
  if (map.kind == FeatureMap::kRelu) return u > 0.f ? 1.f / (u + map.epsilon) : 0.f;
  return u > 0.f ? 1.f / (1.f + u) : 1.f;
}

// Maps that are not linear: ds *= slope. The product is computed once more, where registers are
// free, instead of being kept.
template <class T, int W, int kRowTiles, int kColumns = 32>
PERFORMER_DEVICE void ChainSlope(BackwardTile<kRowTiles, kColumns>& ds, const Map& map,
                                 const T* features, int row0, const T* tokens, int j0, int lane) {
  BackwardTile<kRowTiles, kColumns> x = {};
  FeatureProduct<T, W, kRowTiles, kColumns>(x, features, row0, tokens, j0, lane);
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) ds[m][n][i] *= MapSlope(map, x[m][n][i]);
}

// Gradients of logits are operands in T. Half would lose those of small incoming gradients, so they
// are multiplied by this power of two, given the largest number that they are made of. In other
// types the factor is 1.
template <class T>
PERFORMER_DEVICE float LogitGradientScale(float largest) {
  if constexpr (!std::is_same_v<T, Half>) return 1.f;
  // 2^6 / largest, rounded down to a power of two. Not of 0, infinity or NaN.
  if (!(largest > 0x1p-60f && largest < 0x1p60f)) return 0x1p6f;
  return AsFloat(AsBits(0x1p6f / largest) & 0x7f800000u);
}
// The same for the gradient of a state, and (kWeightScale) for the weights that it is multiplied
// by: products of both and of values of reasonable size fit in half.
template <class T>
PERFORMER_DEVICE float GradStateScale(float largest) {
  return LogitGradientScale<T>(largest) * 0x1p-8f;
}
inline constexpr float kWeightScale = 0x1p6f;

// The largest of values[i * stride], i < count; every thread of the block gets it. `shared`: a
// float for each warp, which nobody else uses before. Ends with a barrier.
template <int kWarps>
PERFORMER_DEVICE float BlockMax(const float* values, int64_t stride, int count, float* shared,
                                int tid) {
  float largest = 0;
  for (int i = tid; i < count; i += 32 * kWarps) largest = fmaxf(largest, values[i * stride]);
  largest = WarpMax(largest);
  if (tid % 32 == 0) shared[tid / 32] = largest;
  __syncthreads();  // maxima of all warps
#pragma unroll
  for (int i = 0; i < kWarps; ++i) largest = fmaxf(largest, shared[i]);
  return largest;
}

// Stores sums over tokens, of columns from c0 on, as rows of partial gradients [.., features][width]
// in memory.
template <int kRowTiles, int kSums>
PERFORMER_DEVICE void StoreSums(float* to, int width, int features, int first_feature,
                                const float (&acc)[kRowTiles][kSums][4], float factor, int c0,
                                int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = first_feature + m * 16 + g + 8 * e;
      if (row >= features) continue;
      float* const from = to + static_cast<int64_t>(row) * width;
#pragma unroll
      for (int n = 0; n < kSums; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = c0 + n * 8 + 2 * t + c;
          if (column < width) from[column] = acc[m][n][2 * e + c] * factor;
        }
    }
}

}  // namespace cuda
}  // namespace performer
