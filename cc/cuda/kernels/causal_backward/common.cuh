// What the kernels of the causal gradient share.
//
//   A_ij  = sum_m exp(a_im + b_mj - lse_i)  for j <= i
//   dA_ij = grad_out_i . v_j - delta_i
//
// where exp(x - lse) = exp(x - row_max) 2^-log_sum, and values are less an origin in float32
// (causal_backward/value_origin.cuh).
//
// In the dq kernel the rows of all large products are features, 16 of a warp. A block walks the
// chunks of its split. If there are more features than a block holds, it takes one feature block
// after the other (backward/common.cuh).
//
// Within a chunk the log-features of a feature are kept relative to its anchor, the running
// reference maximum: the larger of log_mass before the chunk and b of the first key. So
//
//   kb = exp(b - anchor)        f = exp(a + anchor - lse) <= 1
//
// As in the forward pass (causal/causal.cuh) a chunk is taken in sub-chunks, nearly always one. A
// sub-chunk ends before a key that exceeds an anchor by more than kMaxKeyGrowth. Here every warp
// has sub-chunks of its own, for its own features, because nothing else depends on where they end.
#pragma once
#include "core/causal_cut.h"
#include "cuda/kernels/backward/common.cuh"
#include "cuda/kernels/backward/value_origin.cuh"
#include "cuda/kernels/causal/layout.cuh"

namespace performer {
namespace cuda {

// What all kernels of the causal gradient are given.
template <class T>
struct CausalGradientParams : CausalRowsParams<T> {
  RowsOf<const T> grad_out;  // [B L, H, E]
  RowStatistics statistics;  // [B L, H], of CausalStatisticsKernel
  // [splits, 2, G, W] in float32, else nullptr: of the first tile of a split and of the others.
  const float* origin = nullptr;
};

// The origin [W] of the values of a split's first tile, or of its other tiles; nullptr in 16 bits.
template <class T, int W>
PERFORMER_DEVICE const float* OriginOfTile(const float* origin, int64_t split, int64_t groups,
                                           int64_t group, bool other) {
  return kIs16Bit<T> ? nullptr : origin + ((split * 2 + other) * groups + group) * W;
}

// Features relative to an anchor, and sums over rows, do not fit half's range. Where T is half
// they, and what they are multiplied by, are operands in bfloat16. Only log-features come from
// products in half.
template <class T>
using Ranged = std::conditional_t<std::is_same_v<T, Half>, BFloat16, T>;
template <class T>
inline constexpr bool kHasRanged = std::is_same_v<T, Half>;

template <class T>
inline constexpr int kChunkRows = kIs16Bit<T> ? 64 : 32;

template <int W>
inline constexpr int kCausalBackwardWarps = W == 64 ? 8 : 4;

template <class T, int W, int kWarps_>
struct CausalBackwardLayout {
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kFeatures = 16 * kWarps;
  static constexpr int kMaxBytes = MaxSharedBytes(W, kWarps);
  static constexpr int kRows = kChunkRows<T>;
  // Sums over features: a warp has 16 tokens and kWarpColumns, kColumns at a time.
  static constexpr int kParts = kWarps / (kRows / 16);
  static constexpr int kWarpColumns = W / kParts;
  static constexpr int kColumns = kWarpColumns < 32 ? kWarpColumns : 32;
  // Columns of a warp in a tile of pairs [kRows][kRows]. Some warps may have nothing to do.
  static constexpr int kPairColumns = kRows / kParts < 16 ? 16 : kRows / kParts;

  static constexpr int kSize = static_cast<int>(sizeof(T));
  static constexpr int kFeatureBytes = kFeatures * W * kSize;     // an operand [kFeatures][W]
  static constexpr int kSummedBytes = kFeatures * kRows * kSize;  // a tile [kFeatures][kRows]
  static constexpr int kTileBytes = kRows * W * kSize;
  static constexpr int kPairBytes = kRows * kRows * kSize;
};

// Where a warp works in a chunk: on 16 features, of the block, in products over tokens, and on 16
// tokens and one of kParts parts of the columns in sums over features.
template <class Layout>
struct WarpPosition {
  int lane, warp, feature0, row0, part;

  PERFORMER_DEVICE explicit WarpPosition(int tid) {
    const int id = Opaque(tid);
    lane = id % 32, warp = id / 32, feature0 = warp * 16;
    row0 = warp % (Layout::kRows / 16) * 16, part = warp / (Layout::kRows / 16);
  }
};

// Nats by which a key may exceed its anchor.
inline constexpr float kMaxKeyGrowth = kCausalCutNats;

// Keys, or queries, [begin, end) of the kRows of a chunk.
struct SubChunk {
  int begin, end;
  PERFORMER_DEVICE bool has(int column) const { return column >= begin && column < end; }
};

// What a warp does with its 16 features. A thread holds rows g and g + 8 of them.
template <class T, int W>
struct WarpFeatures {
  static constexpr int kRows = kChunkRows<T>;
  using Keys = float[1][kRows / 8][4];

  const Map& map;
  float unit;

  // x += rows x tokens (kColumns from j0). rows(a, s, lane) loads the A operand of the summed
  // indices from 16 s on.
  template <int kColumns, class Rows>
  PERFORMER_DEVICE static void Product(float (&x)[1][kColumns / 8][4], Rows rows, const T* tokens,
                                       int j0, int lane) {
    lane = Opaque(lane);
#pragma unroll(kUnroll<T>)
    for (int s = 0; s < W / 16; ++s) {
      uint32_t a[kFragment<T>];
      rows(a, s, lane);
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t b[kFragment<T>];
        LoadB<T, W>(b, tokens, j0 + n * 16, s * 16, lane);
        Mma<T>(x[0][2 * n], x[0][2 * n + 1], a, b);
      }
    }
  }

  // x = b of all keys of the chunk, and -inf for features that do not exist: of the 16, there are
  // `given`. bias: of the keys, [kRows].
  template <class Rows>
  PERFORMER_DEVICE void KeyLogits(Keys& x, Rows rows, const T* keys, const float* bias, int given,
                                  int lane) const {
    const int t = lane % 4;
    const bool linear = map.linear();
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[0][n][i] = linear ? bias[n * 8 + 2 * t + (i & 1)] : 0.f;
    Product<kRows>(x, rows, keys, 0, lane);
    if (!linear) MapLogits(x[0], map, bias, t);
    if (given < 16)
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (lane / 4 + i / 2 * 8 >= given) x[0][n][i] = -kInfinity;
  }

  // The sub-chunk that begins at `begin`, and its anchors. An anchor is -inf if the feature has
  // seen nothing and sees nothing in this sub-chunk. A key that is NaN begins a sub-chunk.
  PERFORMER_DEVICE SubChunk FindSubChunk(const Keys& x, const float* bias, int begin,
                                         const float (&log_mass)[2], float (&anchor)[2],
                                         int lane) const {
    const bool masked = bias[begin] == -kInfinity;
    const float growth = kMaxKeyGrowth * map.inverse_root;
    bool over = false;
    float limit[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float first = x[0][0][2 * e];
      if (begin > 0)
#pragma unroll
        for (int n = 0; n < kRows / 8; ++n) {
          const float even = x[0][n][2 * e], odd = x[0][n][2 * e + 1];
          if (n == begin / 8) first = begin & 1 ? odd : even;
        }
      first = __shfl_sync(kAllLanes, first, (lane & ~3) | (begin % 8 / 2));
      anchor[e] = masked ? log_mass[e] : fmaxf(log_mass[e], first);
      limit[e] = anchor[e] + growth;
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) over |= !(x[0][n][2 * e + c] <= limit[e]);
    }
    int end = kRows;
    if (__any_sync(kAllLanes, over)) {  // rare: where?
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = n * 8 + 2 * (lane % 4) + (i & 1);
          const float bound = i < 2 ? limit[0] : limit[1];
          if (column > begin && !(x[0][n][i] <= bound)) end = min(end, column);
        }
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2)
        end = min(end, __shfl_xor_sync(kAllLanes, end, lanes));
    }
    return {begin, end};
  }

  // x = kb for the sub-chunk's keys and 0 for others; sum = the sum of kb of each feature.
  PERFORMER_DEVICE void KeyWeights(Keys& x, const SubChunk& sub_chunk, const float (&anchor)[2],
                                   float (&sum)[2], int lane) const {
    const bool whole = sub_chunk.begin == 0 && sub_chunk.end == kRows;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float base = ZeroIfNone(anchor[e]);
      float all = 0;
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& y = x[0][n][2 * e + c];
          y = Exp2((y - base) * unit);
          if (!whole && !sub_chunk.has(n * 8 + 2 * (lane % 4) + c)) y = 0.f;
          all += y;
        }
      sum[e] = QuadSum(all);
    }
  }

  // x = f of kColumns queries from i0 on, and 0 outside the sub-chunk. base: anchor plus feature
  // bias. row_max, log_sum: [kRows], see kKeepsLogSum.
  template <int kColumns, class Rows>
  PERFORMER_DEVICE void QueryFeatures(float (&x)[1][kColumns / 8][4], Rows rows, const T* queries,
                                      const float* row_max, const float* log_sum, int i0,
                                      const SubChunk& sub_chunk, const float (&base)[2],
                                      int lane) const {
    const int t = lane % 4;
    const bool linear = map.linear(), whole = sub_chunk.begin == 0 && sub_chunk.end == kRows;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[0][n][i] = kIs16Bit<T> && linear ? -row_max[i0 + n * 8 + 2 * t + (i & 1)] : 0.f;
    Product<kColumns>(x, rows, queries, i0, lane);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = i0 + n * 8 + 2 * t + (i & 1);
        float& y = x[0][n][i];
        if (!linear) y = MappedLogit(map, y);
        if constexpr (kIs16Bit<T>) {
          if (!linear) y -= row_max[column];
          y += base[i / 2];
        } else {  // two large numbers first
          y += base[i / 2] - row_max[column];
        }
        y = RowWeight<T>(y, log_sum, column, unit);
        if (!whole && !sub_chunk.has(column)) y = 0.f;
      }
  }
};

// acc += state (16 features x W, accumulators) x tokens (kColumns from j0). In 16 bits the state is
// split into the sum of two operands, because the product nearly cancels against delta mass.
template <class R, int W, int kColumns>
PERFORMER_DEVICE void StateProduct(float (&acc)[1][kColumns / 8][4], const float (&state)[W / 8][4],
                                   const R* tokens, int j0, int lane) {
  lane = Opaque(lane);
#pragma unroll
  for (int s = 0; s < W / 16; ++s) {
    uint32_t a[kFragment<R>], rest[kFragment<R>];
    PackA<R>(a, state[2 * s], state[2 * s + 1]);
    if constexpr (kIs16Bit<R>) PackRest<R>(rest, a, state[2 * s], state[2 * s + 1]);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t b[kFragment<R>];
      LoadB<R, W>(b, tokens, j0 + n * 16, s * 16, lane);
      if constexpr (kIs16Bit<R>) Mma<R>(acc[0][2 * n], acc[0][2 * n + 1], rest, b);
      Mma<R>(acc[0][2 * n], acc[0][2 * n + 1], a, b);
    }
  }
}

// Stores the lower triangle of dA in a tile [i][j]; each warp has kColumns of 16 rows. `rest`, if
// it is not nullptr, receives what rounding took from it.
template <class T, int W, int kColumns>
PERFORMER_DEVICE void StorePairGradients(Ranged<T>* tile, Ranged<T>* rest,
                                         const Ranged<T>* grad_out, const Ranged<T>* values,
                                         const float* delta, int r0, int c0, int lane) {
  using R = Ranged<T>;
  constexpr int kRows = kChunkRows<T>;
  if (c0 >= kRows) return;
  lane = Opaque(lane);
  const int g = lane / 4, t = lane % 4;
  float x[kColumns / 8][4];
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) x[n][i] = -delta[r0 + g + i / 2 * 8];
#pragma unroll(kUnroll<T>)
  for (int s = 0; s < W / 16; ++s) {
    uint32_t a[kFragment<R>];
    LoadA<R, W>(a, grad_out, r0, s * 16, lane);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t b[kFragment<R>];
      LoadB<R, W>(b, values, c0 + n * 16, s * 16, lane);
      Mma<R>(x[2 * n], x[2 * n + 1], a, b);
    }
  }
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int i = r0 + g + 8 * e, j = c0 + n * 8 + 2 * t;
      const int at = At<R, kRows>(i, j);
      const float x0 = j <= i ? x[n][2 * e] : 0.f, x1 = j + 1 <= i ? x[n][2 * e + 1] : 0.f;
      StorePair(tile + at, x0, x1);
      if (rest == nullptr) continue;
      const float2 stored = LoadPair(tile + at);
      StorePair(rest + at, x0 - stored.x, x1 - stored.y);
    }
}

// Converts half to bfloat16; `to` may be `from`. Each thread converts what it copied itself with
// CopyRows or CopyOperand, so no barrier is needed before.
template <class T, int W, int kRows, int kThreads>
PERFORMER_DEVICE void MakeRanged(Ranged<T>* to, const T* from, int tid) {
  if constexpr (kHasRanged<T>) {
    constexpr int kChunks = W / kChunk<T>, kStride = kThreads / kChunks;
    tid = Opaque(tid);
#pragma unroll 2
    for (int row = tid / kChunks; row < kRows; row += kStride) {
      const int at = At<T, W>(row, tid % kChunks * kChunk<T>);
#pragma unroll
      for (int i = 0; i < kChunk<T>; i += 2) {
        const float2 x = LoadPair(from + at + i);
        *Pair(to + at + i) = Pack<Ranged<T>>(x.x, x.y);
      }
    }
  }
}

// What the blocks of the dq and dkv kernels have in common.
template <class T, int W, class Params, class Layout, class Pointers>
struct CausalBackwardBlock {
  using L = Layout;
  using R = Ranged<T>;
  using Warp = WarpFeatures<T, W>;
  using Position = WarpPosition<L>;
  static constexpr int C = L::kRows, kThreads = L::kThreads;
  static constexpr int kQueries = 32;  // queries whose features are in registers at a time

  const Params& p;
  unsigned char* shared;
  Warp warp;

  PERFORMER_DEVICE T* tile(int offset) const { return reinterpret_cast<T*>(shared + offset); }
  PERFORMER_DEVICE R* ranged(int offset) const { return reinterpret_cast<R*>(shared + offset); }
  PERFORMER_DEVICE float* floats(int offset) const {
    return reinterpret_cast<float*>(shared + offset);
  }
  PERFORMER_DEVICE const Pointers* pointers() const {
    return reinterpret_cast<const Pointers*>(shared + L::kPointers);
  }
  PERFORMER_DEVICE int heads() const { return static_cast<int>(p.query.heads); }
  PERFORMER_DEVICE int features() const { return static_cast<int>(p.features); }

  PERFORMER_DEVICE void LoadProjection(int first_feature, int tid) const {
    T* const projection = tile(L::kProjection);
    CopyOperand<T, W, L::kFeatures, kThreads>(
        projection, pointers()->projection + first_feature * W,
        static_cast<int>(p.features_pad) - first_feature, tid);
    CpAsyncCommit();
    if constexpr (kHasRanged<T>) {
      CpAsyncWait<0>();
      MakeRanged<T, W, L::kFeatures, kThreads>(ranged(L::kRangedProjection), projection, tid);
    }
  }
};

}  // namespace cuda
}  // namespace performer
