// What the kernels of causal tiles (causal/causal.cuh, causal_backward/query_gradient.cuh) do for the
// keys of their tile: their features relative to anchors, and the state before the tile relative to
// the same.
#pragma once
#include "cuda/kernels/causal/layout.cuh"

namespace performer {
namespace cuda {

// What one block does. The members are the same for all of its threads.
template <class T, int W, class Layout>
struct CausalKeys {
  using L = Layout;
  using Weight = typename L::Weight;
  static constexpr int kKeyTiles = kTile / 8, kColumns = W / 8;
  // Whether operands of the next feature block are held in registers.
  static constexpr bool kHolds = kIs16Bit<T> && W == 64;

  const CausalTileParams<T>& p;
  unsigned char* shared;

  using KeyLogits = float[kKeyTiles][4];
  // Of a thread's features, rows g and g + 8 of the warp's 16.
  struct Anchors {
    float anchor[2];  // -inf where a feature has none
    float mass[2];    // of the state before the tile, relative to the anchor
  };

  PERFORMER_DEVICE T* tile(int offset) const { return reinterpret_cast<T*>(shared + offset); }
  PERFORMER_DEVICE float* floats(int offset) const {
    return reinterpret_cast<float*>(shared + offset);
  }
  PERFORMER_DEVICE CausalPointers<T>* pointers() const {
    return reinterpret_cast<CausalPointers<T>*>(shared + L::kPointers);
  }

  // What a step over a feature block needs from global memory for a thread's features.
  struct Features {
    uint32_t w[kHolds ? W / 16 : 1][kFragment<T>];  // operands of the projection, if kHolds
    // log_mass of the two states that make up the one before the tile, and the bias of queries, all
    // in units of root.
    float before[2], after[2], query_bias[2];
  };

  PERFORMER_DEVICE const uint32_t* Operand(int feature, int stride) const {
    return pointers()->operands + (feature * (W / 16) + stride * 16) * (2 * kFragment<T>);
  }

  // `feature`: the first of the warp.
  PERFORMER_DEVICE void Load(Features& features, int feature, int lane) const {
    if constexpr (kHolds)
#pragma unroll
      for (int s = 0; s < W / 16; ++s) LoadOperand<T>(features.w[s], Operand(feature, s), lane);
    // Lanes r and r + 16 read what belongs to row r.
    const int row = feature + lane % 16;
    const bool given = row < p.features;
    float before = -kInfinity, after = -kInfinity, query_bias = -kInfinity;
    if (given) {
      query_bias = pointers()->feature_bias[row] * p.map.inverse_root;
      if (pointers()->log_mass != nullptr) after = pointers()->log_mass[row];
      if (pointers()->before_mean != nullptr)
        before = pointers()->before_log_mass[row] * p.map.inverse_root;
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int from = lane / 4 + 8 * e;
      features.before[e] = __shfl_sync(kAllLanes, before, from);
      features.after[e] = __shfl_sync(kAllLanes, after, from);
      features.query_bias[e] = __shfl_sync(kAllLanes, query_bias, from);
    }
  }

  // x = b of the warp's 16 features, from `feature` on, and all keys of a tile.
  PERFORMER_DEVICE void Logits(KeyLogits& x, const Features& features, const float* bias,
                               const T* keys, int feature, int lane) const {
    const int t = lane % 4;
    const bool linear = p.map.linear();
    if (linear)
      SetRows(x, bias + 2 * t);
    else
      SetZero(x);
#pragma unroll(kUnroll<T>)
    for (int s = 0; s < W / 16; ++s) {
      uint32_t a[kFragment<T>];
      if constexpr (kHolds) {
#pragma unroll
        for (int i = 0; i < kFragment<T>; ++i) a[i] = features.w[s][i];
      } else {
        LoadOperand<T>(a, Operand(feature, s), lane);
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles / 2; ++n) {
        uint32_t b[kFragment<T>];
        LoadB<T, W>(b, keys, n * 16, s * 16, lane);
        Mma<T>(x[2 * n], x[2 * n + 1], a, b);
      }
    }
    if (!linear) MapLogits(x, p.map, bias, t);
    if (feature + 16 > p.features)
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (feature + lane / 4 + 8 * (i / 2) >= p.features) x[n][i] = -kInfinity;
  }

  // The first anchors: of the state before the tile and the first key. shares: the factors of the
  // two means that make up this state.
  PERFORMER_DEVICE void FirstAnchors(Anchors& anchors, float2 (&shares)[2],
                                     const Features& features, const KeyLogits& x, int lane) const {
    const float unit = p.map.unit();
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float before = features.before[e], after = features.after[e];
      const float larger = fmaxf(before, after), base = ZeroIfNone(larger);
      const float both = Exp2((before - base) * unit) + Exp2((after - base) * unit);
      const float log_mass =
          larger == -kInfinity ? -kInfinity : base + Log2(both) * (kLn2 * p.map.inverse_root);
      const float first = __shfl_sync(kAllLanes, x[0][2 * e], lane & ~3);
      const float anchor = fmaxf(log_mass, first), to = ZeroIfNone(anchor);
      anchors.anchor[e] = anchor;
      shares[e] = float2{Exp2((before - to) * unit), Exp2((after - to) * unit)};
      anchors.mass[e] = shares[e].x + shares[e].y;
    }
  }

  // The anchors of the sub-chunk that begins at column `begin` > 0. shares: the factors of the state
  // relative to the anchors before, and nothing.
  PERFORMER_DEVICE void NextAnchors(Anchors& anchors, float2 (&shares)[2], const KeyLogits& x,
                                    int begin, int lane) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float seen = -kInfinity;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (n * 8 + 2 * (lane % 4) + c <= begin) seen = fmaxf(seen, x[n][2 * e + c]);
      const float anchor = fmaxf(anchors.anchor[e], QuadMax(seen));
      const float keep = anchors.mass[e] == 0.f
                             ? 0.f
                             : Exp2((anchors.anchor[e] - ZeroIfNone(anchor)) * p.map.unit());
      anchors.anchor[e] = anchor;
      anchors.mass[e] *= keep;
      shares[e] = float2{0.f, keep};
    }
  }

  // The first column after `begin` whose key exceeds an anchor of this warp by too much.
  PERFORMER_DEVICE int Cut(const KeyLogits& x, const Anchors& anchors, int begin, int lane) const {
    const float growth = L::kMaxGrowth * p.map.inverse_root;  // in units of root
    float limit[2] = {anchors.anchor[0] + growth, anchors.anchor[1] + growth};
    if constexpr (L::kCutsNan)  // where the past is NaN, all rows are, and nothing needs a cut
#pragma unroll
      for (int e = 0; e < 2; ++e) limit[e] = limit[e] == limit[e] ? limit[e] : kInfinity;
    const auto exceeds = [&](float y, int e) {
      return L::kCutsNan ? !(y <= limit[e]) : y > limit[e];
    };
    bool over = false;
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) over |= exceeds(x[n][i], i / 2);
    int cut = kTile;
    if (__any_sync(kAllLanes, over)) {  // rare: where?
      bool is_nan = false;              // the first key
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = n * 8 + 2 * (lane % 4) + (i & 1);
          is_nan |= column == begin && x[n][i] != x[n][i];
          // The first key itself sets the anchor.
          if (column > begin && exceeds(x[n][i], i / 2)) cut = min(cut, column);
        }
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2)
        cut = min(cut, __shfl_xor_sync(kAllLanes, cut, lanes));
      // Then all later rows are NaN, whatever their keys are.
      if (L::kCutsNan && __any_sync(kAllLanes, is_nan)) cut = kTile;
    }
    return cut;
  }

  // Stores kb = exp(x - anchor) of the keys before `cut`, and 0 for the others; and what queries add
  // to their logits, and the mass of the state.
  PERFORMER_DEVICE void StoreWeights(const KeyLogits& x, const Anchors& anchors,
                                     const Features& features, int cut, int warp, int lane) const {
    const int g = lane / 4, t = lane % 4;
    const float unit = p.map.unit();
    Weight* const weights = reinterpret_cast<Weight*>(shared + L::kWeights);
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (t == 0) {
        floats(L::kAnchor)[warp * 16 + g + 8 * e] = anchors.anchor[e] + features.query_bias[e];
        floats(L::kMass)[warp * 16 + g + 8 * e] = anchors.mass[e];
      }
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      Weight* const to = weights + AtPair<Weight, kTile>(warp * 16 + g, n, t);
      float y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        y[i] = Exp2((x[n][i] - ZeroIfNone(anchors.anchor[i / 2])) * unit);
      }
      if (cut < kTile)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (n * 8 + 2 * t + (i & 1) >= cut) y[i] = 0.f;
      StorePair(to, y[0], y[1]);
      StorePair(to + 8 * kTile, y[2], y[3]);
    }
  }

  // The warp's 16 rows of the state become shares.x before + shares.y state, `before` being that
  // before the split. With kHasOrigin both are less `origin` [W] first, unless it is nullptr.
  PERFORMER_DEVICE void ScaleState(T* state, const float2 (&shares)[2], bool with_before,
                                   int first_feature, int warp, int lane,
                                   const float* origin = nullptr) const {
    constexpr int kChunks = W / kChunk<T>, kRowsAtOnce = 32 / kChunks;
    static_assert(kChunks <= 32 && 16 % kRowsAtOnce == 0);
    float2* const all = reinterpret_cast<float2*>(shared + L::kShares) + warp * 16;
    if (lane % 4 == 0) all[lane / 4] = shares[0], all[lane / 4 + 8] = shares[1];
    __syncwarp();
    const int column = lane % kChunks * kChunk<T>, first_row = lane / kChunks;
    const T* before = with_before ? pointers()->before_mean : nullptr;
    const bool any = before != nullptr;
    if (any) before += static_cast<int64_t>(first_feature + warp * 16 + first_row) * W + column;
    uint4 less = {};  // of these columns
    if constexpr (L::kHasOrigin)
      if (origin != nullptr) less = *reinterpret_cast<const uint4*>(origin + column);
    constexpr int kAtOnce = 4;  // loads in flight
#pragma unroll 1
    for (int n = 0; n < 16 / kRowsAtOnce; n += kAtOnce) {
      uint4 other[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        other[i] = any ? *reinterpret_cast<const uint4*>(before + (n + i) * kRowsAtOnce * W)
                       : uint4{0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = first_row + (n + i) * kRowsAtOnce;
        const float2 share = all[row];
        uint4* const to = reinterpret_cast<uint4*>(state + At<T, W>(warp * 16 + row, column));
        const uint4 mine = *to;
        const auto combine = [&](uint32_t before, uint32_t after, uint32_t less) {
          return Combine(share, before, after, less, with_before);
        };
        *to = {combine(other[i].x, mine.x, less.x), combine(other[i].y, mine.y, less.y),
               combine(other[i].z, mine.z, less.z), combine(other[i].w, mine.w, less.w)};
      }
    }
  }

  // share.x before + share.y after of the numbers in a register, as Weight. They are T if is_first,
  // else after is Weight; and they are `less` (bits of a float) if kHasOrigin. Nothing times a share
  // of 0 counts, unless it is not a number.
  PERFORMER_DEVICE static uint32_t Combine(float2 share, uint32_t before, uint32_t after,
                                           uint32_t less, bool is_first) {
    if constexpr (kIs16Bit<T>) {
      float2 y = {Low<T>(after), High<T>(after)};
      if constexpr (!std::is_same_v<T, Weight>)
        if (!is_first) y = {Low<Weight>(after), High<Weight>(after)};
      return Pack<Weight>(share.x * Low<T>(before) + share.y * y.x,
                          share.x * High<T>(before) + share.y * y.y);
    } else if constexpr (L::kHasOrigin)
      return AsBits(share.x * (AsFloat(before) - AsFloat(less)) +
                    share.y * (AsFloat(after) - AsFloat(less)));
    else
      return AsBits(share.x * AsFloat(before) + share.y * AsFloat(after));
  }
};

}  // namespace cuda
}  // namespace performer
