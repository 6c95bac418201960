// What the causal dkv kernel and that of the key projection's gradient do for a tile of keys and a
// block of features.
#pragma once
#include "cuda/kernels/causal_backward/key_layout.cuh"

namespace performer {
namespace cuda {

// What one block does. A warp has 16 keys from row0 on, of which a thread has rows g and g + 8.
template <class T, int W>
struct CausalKeyGradients {
  using L = CausalKeyLayout<T, W>;
  using R = Ranged<T>;
  static constexpr int kThreads = L::kThreads, kFeatures = L::kFeatures;
  static constexpr int kFeatureTiles = kFeatures / 8, kQueryTiles = kTile / 8;
  // Features of the warp's keys; and pairs of these keys with the queries of the tile.
  using Features = float[kFeatureTiles][4];
  using Pairs = float[kQueryTiles][4];
  // kb as operands.
  using KeyOperand = uint32_t[kFeatures / 16][kFragment<R>];

  const CausalDkvParams<T>& p;
  unsigned char* shared;
  int64_t group;

  PERFORMER_DEVICE T* tile(int offset) const { return reinterpret_cast<T*>(shared + offset); }
  PERFORMER_DEVICE R* ranged(int offset) const { return reinterpret_cast<R*>(shared + offset); }
  PERFORMER_DEVICE float* floats(int offset) const {
    return reinterpret_cast<float*>(shared + offset);
  }
  PERFORMER_DEVICE const CausalDkvPointers<T>* pointers() const {
    return reinterpret_cast<const CausalDkvPointers<T>*>(shared + L::kPointers);
  }
  PERFORMER_DEVICE int each() const { return static_cast<int>(p.query.heads / p.groups); }
  PERFORMER_DEVICE T* projection(int stage) const {
    return tile(L::kStage + stage * L::kStageBytes);
  }
  PERFORMER_DEVICE R* reverse(int stage, int part) const {
    return ranged(L::kStage + stage * L::kStageBytes + (1 + part) * L::kFeatureBytes);
  }
  // The projection as an operand in R.
  PERFORMER_DEVICE R* ranged_projection(int stage) const {
    return ranged(kHasRanged<T> ? L::kRangedProjection : L::kStage + stage * L::kStageBytes);
  }
  // r; what R and r are relative to; exp(that - log_mass after the split): [kFeatures] each.
  PERFORMER_DEVICE float* numbers(int stage, int which) const {
    return floats(L::kNumbers) + (stage * 3 + which) * kFeatures;
  }

  // Starts copying the queries of the tile, and grad_out, of query head `head` of the group.
  PERFORMER_DEVICE void IssueQueries(int head, int rows, int tid) const {
    const auto valid = [&](int r) { return r < rows; };
    CopyRows<T, W, kTile, kThreads>(tile(L::kQuery), pointers()->query + head * p.query.width, 0,
                                    p.query, tid, valid);
    IssueGradOut(head, rows, tid);
    if (tid < kTile)
      LoadStatistics<T>(floats(L::kRowMax), floats(L::kLogSum), floats(L::kDelta), tid,
                        pointers()->statistics, static_cast<int64_t>(tid) * p.query.heads + head,
                        valid(tid));
  }
  PERFORMER_DEVICE void IssueGradOut(int head, int rows, int tid) const {
    CopyRows<T, W, kTile, kThreads>(tile(L::kGradOut),
                                    pointers()->grad_out + head * p.grad_out.width, 0, p.grad_out,
                                    tid, [&](int r) { return r < rows; });
    CpAsyncCommit();
  }
  // Once what this thread copied is there.
  PERFORMER_DEVICE void FinishKeys(int tid) const {
    if constexpr (!kIs16Bit<T>)
      SubtractOrigin<T, W, kTile, kThreads>(tile(L::kValue), pointers()->origin, tid);
    MakeRanged<T, W, kTile, kThreads>(ranged(L::kValue), tile(L::kValue), tid);
  }
  PERFORMER_DEVICE void FinishGradOut(int tid) const {
    MakeRanged<T, W, kTile, kThreads>(ranged(L::kGradOut), tile(L::kGradOut), tid);
  }

  // Starts copying a feature block.
  PERFORMER_DEVICE void IssueFeatures(int first, int stage, int tid) const {
    const CausalDkvPointers<T>& from = *pointers();
    const int64_t at = static_cast<int64_t>(first) * W;
    CopyOperand<T, W, kFeatures, kThreads>(projection(stage), from.projection + at, tid);
#pragma unroll
    for (int part = 0; part < L::kParts; ++part)
      CopyOperand<R, W, kFeatures, kThreads>(reverse(stage, part),
                                             from.reverse + part * p.features_pad * W + at, tid);
    if (tid < 3 * kFeatures / 4)
      CpAsync16(
          numbers(stage, 0) + tid * 4,
          from.numbers + tid / (kFeatures / 4) * p.features_pad + first + tid % (kFeatures / 4) * 4,
          true);
    CpAsyncCommit();
  }

  // dA of the warp's keys and the queries from the first of these on, to shared memory. Only this
  // warp reads it.
  PERFORMER_DEVICE void StorePairGradients(int row0, int lane) const {
    const int g = lane / 4, t = lane % 4;
    const float* const delta = floats(L::kDelta);
    Pairs x;
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] = -delta[n * 8 + 2 * t + (i & 1)];
#pragma unroll(kUnroll<T>)
    for (int s = 0; s < W / 16; ++s) {
      uint32_t a[kFragment<R>];
      LoadA<R, W>(a, ranged(L::kValue), row0, s * 16, lane);
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

  // The reverse state after the split, of the elements of R that this thread adds it to.
  static constexpr int kChunks = W / kChunk<R>, kRowsAtOnce = kThreads / kChunks;
  struct After {
    float4 x[kFeatures / kRowsAtOnce][kChunk<R> / 4];
  };
  PERFORMER_DEVICE void LoadAfter(After& after, int first, int tid) const {
    const int row = tid / kChunks, column = tid % kChunks * kChunk<R>;
    const float* const from =
        pointers()->after_mean + static_cast<int64_t>(first + row) * W + column;
#pragma unroll
    for (int n = 0; n < kFeatures / kRowsAtOnce; ++n)
#pragma unroll
      for (int i = 0; i < kChunk<R> / 4; ++i)
        after.x[n][i] = first + row + n * kRowsAtOnce < p.features
                            ? *reinterpret_cast<const float4*>(from + n * kRowsAtOnce * W + i * 4)
                            : float4{0, 0, 0, 0};
  }
  // R and r += those after the split.
  PERFORMER_DEVICE void AddAfter(const After& after, int first, int stage, int tid) const {
    tid = Opaque(tid);
    const int row = tid / kChunks, column = tid % kChunks * kChunk<R>;
#pragma unroll
    for (int n = 0; n < kFeatures / kRowsAtOnce; ++n) {
      const int r = row + n * kRowsAtOnce, at = At<R, W>(r, column);
      const float keep = numbers(stage, 2)[r];
#pragma unroll
      for (int i = 0; i < kChunk<R> / 4; ++i) {
        const float4 more = after.x[n][i];
        if constexpr (kIs16Bit<R>) {
          uint32_t* const high = Pair(reverse(stage, 0) + at + i * 4);
          uint32_t* const low = Pair(reverse(stage, 1) + at + i * 4);
          Add(high[0], low[0], keep * more.x, keep * more.y);
          Add(high[1], low[1], keep * more.z, keep * more.w);
        } else {
          float4& x = *reinterpret_cast<float4*>(reverse(stage, 0) + at);
          x = float4{x.x + keep * more.x, x.y + keep * more.y, x.z + keep * more.z,
                     x.w + keep * more.w};
        }
      }
    }
    if (tid < kFeatures && first + tid < p.features)
      numbers(stage, 0)[tid] += numbers(stage, 2)[tid] * pointers()->after_mass[first + tid];
  }
  PERFORMER_DEVICE static void Add(uint32_t& high, uint32_t& low, float x, float y) {
    x += Low<R>(high) + Low<R>(low);
    y += High<R>(high) + High<R>(low);
    high = Pack<R>(x, y);
    low = Pack<R>(x - Low<R>(high), y - High<R>(high));
  }

  // A warp's part of a feature block in products with queries: 16 features and 32 queries.
  using QueryTile = float[4][4];
  PERFORMER_DEVICE static int Feature0(int warp) { return warp % (kFeatures / 16) * 16; }
  PERFORMER_DEVICE static int Query0(int warp) { return warp / (kFeatures / 16) * 32; }
  static_assert(L::kWarps / (kFeatures / 16) * 32 == kTile);

  // x = log2 of the weights of features, without what comes from keys. base: added to each row of
  // features, in units of root.
  PERFORMER_DEVICE void QueryLogWeights(QueryTile& x, const float (&base)[2], int first, int head,
                                        int warp, int lane) const {
    const int t = lane % 4, i0 = Query0(warp);
    const bool linear = p.map.linear();
    const float unit = p.map.unit();
    const float *const row_max = floats(L::kRowMax), *const log_sum = floats(L::kLogSum);
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[n][i] = kIs16Bit<T> && linear ? -row_max[i0 + n * 8 + 2 * t + (i & 1)] : 0.f;
    const uint32_t* const operands =
        p.query_operands +
        (QueryHeadIndex(p.query_projections, group * each() + head, p.query.heads, group) *
             p.features_pad +
         first + Feature0(warp)) *
            (W * L::kSize / 4);
#pragma unroll(kUnroll<T>)
    for (int s = 0; s < W / 16; ++s) {
      uint32_t a[kFragment<T>];
      LoadOperand<T>(a, operands + s * 32 * kFragment<T>, lane);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint32_t b[kFragment<T>];
        LoadB<T, W>(b, tile(L::kQuery), i0 + n * 16, s * 16, lane);
        Mma<T>(x[2 * n], x[2 * n + 1], a, b);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = i0 + n * 8 + 2 * t + (i & 1);
        float& y = x[n][i];
        if (!linear) y = MappedLogit(p.map, y);
        if constexpr (kIs16Bit<T>) {
          if (!linear) y -= row_max[row];
          y = (y + base[i / 2]) * unit;
        } else {  // two large numbers first
          y = (y + (base[i / 2] - row_max[row])) * unit - log_sum[row];
        }
      }
  }

  // feature_bias of a thread's rows of features, in units of root; -inf past the last one.
  PERFORMER_DEVICE void FeatureBias(float (&bias)[2], int first, int head, int warp,
                                    int lane) const {
    const float* const from =
        p.feature_bias +
        QueryHeadIndex(p.feature_bias_heads, group * each() + head, p.query.heads, group) *
            p.features;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int feature = first + Feature0(warp) + lane / 4 + 8 * e;
      bias[e] = feature < p.features ? from[feature] * p.map.inverse_root : -kInfinity;
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
      const float reference = numbers(stage, 1)[Feature0(warp) + lane / 4 + 8 * e];
      base[e] = reference == kInfinity ? -kInfinity : base[e] + reference;
    }
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
    const float* const mass = numbers(stage, 0);
#pragma unroll
    for (int n = 0; n < kFeatureTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        y[n][i] = with_state ? -mass[n * 8 + 2 * (lane % 4) + (i & 1)] : 0.f;
    if (with_state)
#pragma unroll(kUnroll<T>)
      for (int s = 0; s < W / 16; ++s) {
        uint32_t a[kFragment<R>];
        LoadA<R, W>(a, ranged(L::kValue), row0, s * 16, lane);
#pragma unroll
        for (int n = 0; n < kFeatureTiles / 2; ++n)
#pragma unroll
          for (int part = L::kParts - 1; part >= 0; --part) {  // the small one first
            uint32_t b[kFragment<R>];
            LoadB<R, W>(b, reverse(stage, part), n * 16, s * 16, lane);
            Mma<R>(y[2 * n], y[2 * n + 1], a, b);
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
    const float* const reference = numbers(stage, 1);
    const float unit = p.map.unit();
#pragma unroll
    for (int n = 0; n < kFeatureTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = Exp2((x[n][i] - reference[n * 8 + 2 * (lane % 4) + (i & 1)]) * unit);
        y[n][i] = weight == 0.f ? 0.f : weight * y[n][i];
        x[n][i] = weight;
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
