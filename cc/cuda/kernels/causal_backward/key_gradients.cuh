// What the causal dkv kernel and that of the key projection's gradient do for a tile of keys and a
// block of features.
#pragma once
#include "cuda/kernels/causal_backward/key_state.cuh"

namespace performer {
namespace cuda {

// What one block does. A warp has 16 keys from row0 on, of which a thread has rows g and g + 8.
template <class T, int W>
struct CausalKeyGradients : CausalKeyState<T, W> {
  using Base = CausalKeyState<T, W>;
  using Base::Feature0, Base::Query0, Base::FeatureBias, Base::QueryLogWeights;
  using Base::kThreads, Base::kFeatures;
  using Base::p, Base::tile, Base::ranged, Base::floats, Base::numbers, Base::reverse;
  using Base::values, Base::projection, Base::references, Base::advances;
  using typename Base::L, typename Base::R, typename Base::N, typename Base::QueryTile;
  static constexpr int kFeatureTiles = kFeatures / 8, kQueryTiles = kTile / 8;
  // Features of the warp's keys; and pairs of these keys with the queries of the tile.
  using Features = float[kFeatureTiles][4];
  using Pairs = float[kQueryTiles][4];
  // kb as operands.
  using KeyOperand = uint32_t[kFeatures / 16][kFragment<R>];

  // dA of the warp's keys and the queries from the first of these on, to shared memory. Only this
  // warp reads it.
  PERFORMER_DEVICE void StorePairGradients(int row0, int lane) const {
    const int g = lane / 4, t = lane % 4;
    const float* const delta = floats(L::kDelta);
    Pairs x;
    SetRows(x, delta + 2 * t, -1.f);
#pragma unroll(kUnroll<T>)
    for (int s = 0; s < W / 16; ++s) {
      uint32_t a[kFragment<R>];
      Base::LoadRangedValues(a, row0, s, lane);
#pragma unroll
      for (int n = 0; n < kQueryTiles / 2; ++n) {
        if (n * 16 < row0) continue;  // above the triangle
        uint32_t b[kFragment<R>];
        LoadB<R, W>(b, ranged(L::kGradOut), n * 16, s * 16, lane);
        Mma<R>(x[2 * n], x[2 * n + 1], a, b);
      }
    }
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int j = row0 + g + 8 * e, i = n * 8 + 2 * t;
        StorePair(ranged(L::kPairs) + AtPair<R, kTile>(row0 + g, n, t) + 8 * e * kTile,
                  j <= i ? x[n][2 * e] : 0.f, j <= i + 1 ? x[n][2 * e + 1] : 0.f);
      }
  }

  // f = exp(a + reference - lse) of a feature block and all queries to shared memory. Returns
  // whether one of them is too large: keys of the tile outweigh all before them by far.
  PERFORMER_DEVICE bool StoreQueryFeatures(int first, int stage, int head, int warp,
                                           int lane) const {
    QueryTile x;
    float base[2];
    FeatureBias(base, first, head, warp, lane);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int feature = Feature0(warp) + lane / 4 + 8 * e;
      float reference = numbers(stage, kReference)[feature];
      if (advances()) {
        reference = MergedLogMass(p.map, numbers(stage, kBeforeLogMass)[feature],
                                  numbers(stage, kTileLogMass)[feature]);
        if (reference == -kInfinity) reference = kInfinity;
        if (Query0(warp) == 0 && lane % 4 == 0) floats(L::kStateReference)[feature] = reference;
      }
      base[e] = reference == kInfinity ? -kInfinity : base[e] + reference;
    }
    if constexpr (L::kAdvances)
      if (advances()) Base::StoreNextFeatures(base, first, head, warp, lane);
    QueryLogWeights(x, base, first, head, warp, lane);
    bool steep = false;
    R* const to = ranged(L::kQueryFeatures);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        steep |= x[n][i] > kCausalCutBits;
        x[n][i] = Exp2(x[n][i]);
      }
      const int at = AtPair<R, kTile>(Feature0(warp) + lane / 4, Query0(warp) / 8 + n, lane % 4);
      StorePair(to + at, x[n][0], x[n][1]);
      StorePair(to + at + 8 * kTile, x[n][2], x[n][3]);
    }
    return steep;
  }

  // x += w . k of the warp's keys.
  PERFORMER_DEVICE void KeyProducts(Features& x, int stage, int row0, int lane) const {
#pragma unroll(kUnroll<T>)
    for (int s = 0; s < W / 16; ++s) {
      uint32_t a[kFragment<T>];
      LoadA<T, W>(a, tile(L::kKey), row0, s * 16, lane);
#pragma unroll
      for (int n = 0; n < kFeatureTiles / 2; ++n) {
        uint32_t b[kFragment<T>];
        LoadB<T, W>(b, projection(stage), n * 16, s * 16, lane);
        Mma<T>(x[2 * n], x[2 * n + 1], a, b);
      }
    }
  }

  // x = b. bias: of the tile's keys.
  PERFORMER_DEVICE void KeyLogits(Features& x, const float* bias, int stage, int row0,
                                  int lane) const {
    const bool linear = p.map.linear();
    const float of_row[2] = {bias[row0 + lane / 4], bias[row0 + lane / 4 + 8]};
#pragma unroll
    for (int n = 0; n < kFeatureTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] = linear ? of_row[i / 2] : 0.f;
    KeyProducts(x, stage, row0, lane);
    if (linear) return;
#pragma unroll
    for (int n = 0; n < kFeatureTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] = MappedLogit(p.map, x[n][i]) + of_row[i / 2];
  }

  // db / kb of what the reverse state and the tile's own queries give: with_state, pairs.
  PERFORMER_DEVICE void WeightGradients(Features& y, bool with_state, bool pairs, int stage,
                                        int row0, int lane) const {
    const float* const mass = numbers(stage, kMass);
    if (!kIs16Bit<T> && with_state)
      SetRows(y, mass + 2 * (lane % 4), -1.f);
    else
      SetZero(y);
    if (with_state) {
#pragma unroll(kUnroll<T>)
      for (int s = 0; s < W / 16; ++s) {
        uint32_t a[kFragment<N>];
        LoadA<N, W>(a, values(), row0, s * 16, lane);
#pragma unroll
        for (int n = 0; n < kFeatureTiles / 2; ++n) {
          uint32_t b[kFragment<N>];
          LoadB<N, W>(b, reverse(stage), n * 16, s * 16, lane);
          Mma<N>(y[2 * n], y[2 * n + 1], a, b);
        }
      }
      if constexpr (kIs16Bit<T>) {
        const float factor[2] = {Base::ValueFactor(row0, 0, lane),
                                 Base::ValueFactor(row0, 1, lane)};
#pragma unroll
        for (int n = 0; n < kFeatureTiles; ++n) {
          const int feature = n * 8 + 2 * (lane % 4);
          const float2 of_feature = LoadPair(floats(L::kReverseFactor) + feature);
          const float2 less = LoadPair(mass + feature);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            y[n][i] = factor[i / 2] * (i & 1 ? of_feature.y : of_feature.x) * y[n][i] -
                      (i & 1 ? less.y : less.x);
        }
      }
    }
    if (pairs)
#pragma unroll
      for (int s = 0; s < kTile / 16; ++s) {
        if (s * 16 < row0) continue;  // above the triangle
        uint32_t a[kFragment<R>];
        LoadA<R, kTile>(a, ranged(L::kPairs), row0, s * 16, lane);
#pragma unroll
        for (int n = 0; n < kFeatureTiles / 2; ++n) {
          uint32_t b[kFragment<R>];
          LoadB<R, kTile>(b, ranged(L::kQueryFeatures), n * 16, s * 16, lane);
          Mma<R>(y[2 * n], y[2 * n + 1], a, b);
        }
      }
  }

  // y *= kb, which becomes an operand too.
  PERFORMER_DEVICE void TakeKeyWeights(Features& y, KeyOperand& kb, const float* bias, int stage,
                                       int row0, int lane) const {
    Features x;
    KeyLogits(x, bias, stage, row0, lane);
    const float* const reference = references(stage);
    const float unit = p.map.unit();
#pragma unroll
    for (int n = 0; n < kFeatureTiles; ++n) {
      const float2 less = LoadPair(reference + n * 8 + 2 * (lane % 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = Exp2((x[n][i] - (i & 1 ? less.y : less.x)) * unit);
        y[n][i] = weight == 0.f ? 0.f : weight * y[n][i];
        x[n][i] = weight;
      }
    }
#pragma unroll
    for (int s = 0; s < kFeatures / 16; ++s) PackA<R>(kb[s], x[2 * s], x[2 * s + 1]);
  }

  // Steep keys: log-weights of queries to shared memory, where f was.
  PERFORMER_DEVICE void StoreQueryLogWeights(int first, int head, int warp, int lane) const {
    QueryTile x;
    float bias[2];
    FeatureBias(bias, first, head, warp, lane);
    QueryLogWeights(x, bias, first, head, warp, lane);
    float* const to = floats(L::kQueryFeatures);
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        to[(Query0(warp) + n * 8 + 2 * (lane % 4) + (i & 1)) * kFeatures + Feature0(warp) +
           lane / 4 + i / 2 * 8] = x[n][i];
  }
  // Steep keys: db and local += what the tile's own queries give, each pair by itself. Every
  // exponential is that of a weight, at most 1.
  PERFORMER_DEVICE void TakePairs(Features& db, Pairs& local, const float* bias, int stage,
                                  int row0, int lane) const {
    const int g = lane / 4, t = lane % 4;
    Features x;
    KeyLogits(x, bias, stage, row0, lane);
#pragma unroll
    for (int n = 0; n < kFeatureTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] *= p.map.unit();
#pragma unroll
    for (int m = 0; m < kQueryTiles; ++m) {
      if (m * 8 + 7 < row0) continue;  // above the triangle
#pragma unroll 1
      for (int c = 0; c < 8; ++c) {
        const int i = m * 8 + c;
        const float* const logs = floats(L::kQueryFeatures) + i * kFeatures + 2 * t;
        float sum[2] = {}, da[2];
#pragma unroll
        for (int e = 0; e < 2; ++e)
          da[e] = ToFloat(ranged(L::kPairs)[At<R, kTile>(row0 + g + 8 * e, i)]);
#pragma unroll
        for (int n = 0; n < kFeatureTiles; ++n) {
          const float2 log = LoadPair(logs + n * 8);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            float weight = Exp2(x[n][k] + (k & 1 ? log.y : log.x));
            if (row0 + g + k / 2 * 8 > i) weight = 0.f;
            sum[k / 2] += weight;
            if (weight != 0.f) db[n][k] += weight * da[k / 2];
          }
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float all = QuadSum(sum[e]);
          if (c == 2 * t) local[m][2 * e] += all;
          if (c == 2 * t + 1) local[m][2 * e + 1] += all;
        }
      }
    }
  }

  // Maps that are not linear: db *= slope.
  PERFORMER_DEVICE void TakeSlopes(Features& db, int stage, int row0, int lane) const {
    Features x = {};
    KeyProducts(x, stage, row0, lane);
#pragma unroll
    for (int n = 0; n < kFeatureTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) db[n][i] *= MapSlope(p.map, x[n][i]);
  }
};

// Starts copying the keys and values of a block's tile.
template <class T, int W, class Stream>
PERFORMER_DEVICE void IssueKeys(const CausalKeyGradients<T, W>& block, Stream& stream, int tid) {
  using L = CausalKeyLayout<T, W>;
  stream.LoadKeyBias(0, tid);
  stream.StoreKeyBias(0, tid);
  __syncthreads();  // the mask of the keys is visible
  stream.Issue(0, 0, block.tile(L::kKey), block.tile(L::kValue), tid);
}

}  // namespace cuda
}  // namespace performer
