// The running state of the causal kernel (causal/causal.cuh), and how it takes the keys and values
// of a chunk.
#pragma once
#include "cuda/kernels/causal/layout.cuh"

namespace performer {
namespace cuda {

// What one block does. The members are the same for all of its threads.
template <class T, int W, int kFeatureTiles, bool kSmall>
struct CausalState {
  using L = CausalLayout<T, W, kFeatureTiles, kSmall>;
  static constexpr int C = L::kChunk, kKeyTiles = C / 8, kColumns = W / 8;

  const CausalParams<T>& p;
  unsigned char* shared;

  // The state of a thread's features: rows g and g + 8 of each 16.
  struct State {
    float sum[kFeatureTiles][kColumns][4], anchor[kFeatureTiles][2], mass[kFeatureTiles][2];
  };
  using KeyLogits = float[kFeatureTiles][kKeyTiles][4];

  PERFORMER_DEVICE int first_feature() const { return blockIdx.z * L::kFeatures; }
  // kMaxGrowth in units of root.
  PERFORMER_DEVICE float growth() const { return L::kMaxGrowth * p.map.inverse_root; }

  PERFORMER_DEVICE T* tile(int offset) const { return reinterpret_cast<T*>(shared + offset); }
  PERFORMER_DEVICE float* floats(int offset) const {
    return reinterpret_cast<float*>(shared + offset);
  }
  PERFORMER_DEVICE CausalPointers<T>* pointers() const {
    return reinterpret_cast<CausalPointers<T>*>(shared + L::kPointers);
  }
  PERFORMER_DEVICE int feature(int feature_tile, int warp) const {  // in the block, first of 16
    return (feature_tile * L::kWarps + warp) * 16;
  }

  PERFORMER_DEVICE void Start(State& state, int64_t index, int warp, int lane) const {
    const int g = lane / 4, t = lane % 4, width = p.keys.value.width;
#pragma unroll
    for (int m = 0; m < kFeatureTiles; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = first_feature() + feature(m, warp) + g + 8 * e;
        const int64_t at = index * p.features + row;
        const float log_mass = row < p.features ? p.before_log_mass[at] : -kInfinity;
        const bool any = log_mass != -kInfinity;
        state.mass[m][e] = any ? 1.f : 0.f;
        state.anchor[m][e] = any ? log_mass * p.map.inverse_root : 0.f;
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int column = n * 8 + 2 * t + c;
            state.sum[m][n][2 * e + c] =
                any && column < width ? p.before_mean[at * width + column] : 0.f;
          }
      }
  }

  PERFORMER_DEVICE void Finish(const State& state, int64_t index, int rows, int warp,
                               int lane) const {
    const int g = lane / 4, t = lane % 4, width = p.keys.value.width;
    const int* poison = reinterpret_cast<const int*>(shared + L::kPoison);
#pragma unroll
    for (int m = 0; m < kFeatureTiles; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = first_feature() + feature(m, warp) + g + 8 * e;
        if (row >= p.features) continue;
        const int64_t at = index * p.features + row;
        const float mass = state.mass[m][e], inverse = mass == 0.f ? 0.f : 1.f / mass;
        if (t == 0)
          p.log_mass[at] = mass == 0.f ? -kInfinity : state.anchor[m][e] * p.map.root + logf(mass);
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int column = n * 8 + 2 * t + c;
            if (column < width)
              p.mean[at * width + column] = poison[column] < rows ? NAN
                                            : mass == 0.f ? 0.f
                                                          : state.sum[m][n][2 * e + c] * inverse;
          }
      }
  }

  // x = b of the warp's features and the keys of a tile, and -inf for keys before `begin`.
  PERFORMER_DEVICE void Keys(KeyLogits& x, const T* keys, const float* bias, int begin, int warp,
                             int lane) const {
    const int t = lane % 4;
    const bool linear = p.map.linear();
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float start = linear ? bias[n * 8 + 2 * t + (i & 1)] : 0.f;
#pragma unroll
        for (int m = 0; m < kFeatureTiles; ++m) x[m][n][i] = start;
      }
    const uint32_t* operands = pointers()->operands;
#pragma unroll
    for (int s = 0; s < W / 16; ++s) {
      uint32_t a[kFeatureTiles][kFragment<T>];
#pragma unroll
      for (int m = 0; m < kFeatureTiles; ++m) {
        // Past the last features the first ones are read, and their logits are replaced below.
        const int row = first_feature() + feature(m, warp) < p.features_pad ? feature(m, warp) : 0;
        LoadOperand<T>(a[m], operands + (row / 16 * (W / 16) + s) * 32 * kFragment<T>, lane);
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles / 2; ++n) {
        uint32_t b[kFragment<T>];
        LoadB<T, W>(b, keys, n * 16, s * 16, lane);
#pragma unroll
        for (int m = 0; m < kFeatureTiles; ++m) Mma<T>(x[m][2 * n], x[m][2 * n + 1], a[m], b);
      }
    }
    if (!linear)
#pragma unroll
      for (int m = 0; m < kFeatureTiles; ++m) MapLogits(x[m], p.map, bias, t);
    if (begin > 0) HideKeys(x, [&](int j) { return j < begin; }, lane);
    if (first_feature() + L::kFeatures > p.features)
#pragma unroll
      for (int m = 0; m < kFeatureTiles; ++m)
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (first_feature() + feature(m, warp) + lane / 4 + 8 * (i / 2) >= p.features)
              x[m][n][i] = -kInfinity;
  }

  template <class Hide>
  PERFORMER_DEVICE static void HideKeys(KeyLogits& x, Hide hide, int lane) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (hide(n * 8 + 2 * (lane % 4) + (i & 1)))
#pragma unroll
          for (int m = 0; m < kFeatureTiles; ++m) x[m][n][i] = -kInfinity;
  }

  // Finds the anchors of the sub-chunk that begins at column `begin`. `keep` is the factor of the
  // old state, and `none` says that a feature has no anchor. Returns the first column whose key the
  // sub-chunk may not hold, judged by this warp's features.
  PERFORMER_DEVICE int Anchor(const KeyLogits& x, const float* bias, int begin, State& state,
                              float (&keep)[kFeatureTiles][2], bool (&none)[kFeatureTiles][2],
                              int lane) const {
    const bool masked = bias[begin] == -kInfinity;
    float over = -kInfinity;  // how much a key exceeds what its feature allows
#pragma unroll
    for (int m = 0; m < kFeatureTiles; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float first = x[m][0][2 * e];
        if (begin > 0)
#pragma unroll
          for (int n = 0; n < kKeyTiles; ++n) {
            const float even = x[m][n][2 * e], odd = x[m][n][2 * e + 1];
            if (n == begin / 8) first = begin & 1 ? odd : even;
          }
        first = __shfl_sync(kAllLanes, first, (lane & ~3) | (begin % 8 / 2));
        const float mass = state.mass[m][e];
        const float log_mass =
            mass != 0.f ? state.anchor[m][e] + log2f(mass) / p.map.unit() : -kInfinity;
        const float next = masked ? log_mass : fmaxf(log_mass, first);
        none[m][e] = next == -kInfinity;
        keep[m][e] = mass != 0.f ? Exp2((state.anchor[m][e] - next) * p.map.unit()) : 0.f;
        state.anchor[m][e] = ZeroIfNone(next);
        const float limit = none[m][e] ? -kInfinity : next + growth();
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c)
            if (x[m][n][2 * e + c] > limit) over = 1.f;
      }
    int cut = C;
    if (__any_sync(kAllLanes, over > 0.f)) {  // rare: where?
#pragma unroll
      for (int m = 0; m < kFeatureTiles; ++m)
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = n * 8 + 2 * (lane % 4) + (i & 1);
            const float limit = none[m][i / 2] ? -kInfinity : state.anchor[m][i / 2] + growth();
            // The first key itself sets the anchor.
            if (column > begin && x[m][n][i] > limit) cut = min(cut, column);
          }
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2)
        cut = min(cut, __shfl_xor_sync(kAllLanes, cut, lanes));
    }
    return cut;
  }

  // Stores kb and the old state in shared memory, relative to the new anchors. Then the state takes
  // the keys of the sub-chunk.
  PERFORMER_DEVICE void Update(KeyLogits& x, const T* values, const float (&keep)[kFeatureTiles][2],
                               const bool (&none)[kFeatureTiles][2], State& state, int warp,
                               int lane) const {
    const int g = lane / 4, t = lane % 4;
    T* const weights = tile(L::kWeights);
    T* const before = tile(L::kBefore);
    const float* feature_bias = pointers()->feature_bias + first_feature();
#pragma unroll
    for (int m = 0; m < kFeatureTiles; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = feature(m, warp) + g + 8 * e, feature = first_feature() + row;
        const float old = state.mass[m][e] * keep[m][e];
        float added = 0;
        if (t == 0) {
          floats(L::kAnchor)[row] =
              none[m][e] || feature >= p.features
                  ? -kInfinity
                  : state.anchor[m][e] + feature_bias[row] * p.map.inverse_root;
          floats(L::kMass)[row] = old;
        }
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          float &s0 = state.sum[m][n][2 * e], &s1 = state.sum[m][n][2 * e + 1];
          s0 *= keep[m][e];
          s1 *= keep[m][e];
          StorePair(before + At<T, W>(row, n * 8 + 2 * t), s0, s1);
        }
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          float &y0 = x[m][n][2 * e], &y1 = x[m][n][2 * e + 1];
          y0 = Exp2((y0 - state.anchor[m][e]) * p.map.unit());
          y1 = Exp2((y1 - state.anchor[m][e]) * p.map.unit());
          added += y0 + y1;
          StorePair(weights + At<T, C>(row, n * 8 + 2 * t), y0, y1);
        }
        state.mass[m][e] = old + QuadSum(added);
      }
#pragma unroll
    for (int s = 0; s < C / 16; ++s) {
      uint32_t a[kFeatureTiles][kFragment<T>];
#pragma unroll
      for (int m = 0; m < kFeatureTiles; ++m) PackA<T>(a[m], x[m][2 * s], x[m][2 * s + 1]);
#pragma unroll
      for (int n = 0; n < kColumns / 2; ++n) {
        uint32_t b[kFragment<T>];
        LoadBTrans<T, W>(b, values, s * 16, n * 16, lane);
#pragma unroll
        for (int m = 0; m < kFeatureTiles; ++m)
          Mma<T>(state.sum[m][2 * n], state.sum[m][2 * n + 1], a[m], b);
      }
    }
  }

  // Replaces infinities and NaN of v by 0. poison[e] becomes the first row, counted from `row`,
  // that held one in column e. Each thread reads the values that it copied itself. The order of
  // atomicMin does not matter.
  PERFORMER_DEVICE void ZeroNonFinite(T* values, int row, int tid) const {
    constexpr int kChunks = W / kChunk<T>, kStride = L::kThreads / kChunks;
    int* poison = reinterpret_cast<int*>(shared + L::kPoison);
    tid = Opaque(tid);
    const int column = tid % kChunks * kChunk<T>;
#pragma unroll 1
    for (int r = tid / kChunks; r < C; r += kStride) {
      T* x = values + At<T, W>(r, column);
      bool non_finite = false;
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) non_finite |= !IsFinite(x[i]);
      if (!non_finite) continue;
#pragma unroll 1
      for (int i = 0; i < kChunk<T>; ++i)
        if (!IsFinite(x[i])) {
          x[i] = FromFloat<T>(0.f);
          atomicMin(poison + column + i, row + r);
        }
    }
  }
};

}  // namespace cuda
}  // namespace performer
