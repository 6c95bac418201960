// The reverse state (R, r) after the tile of a block, a feature block at a time: that of the
// checkpoint, with what follows the split. Where the checkpoint is that after the next tile, the
// block adds the next tile's queries to it, as ReverseStatesKernel does.
#pragma once
#include "cuda/kernels/causal_backward/key_rows.cuh"

namespace performer {
namespace cuda {

template <class T, int W>
struct CausalKeyState : CausalKeyRows<T, W> {
  using Base = CausalKeyRows<T, W>;
  using Base::Feature0, Base::Query0;
  using Base::kThreads, Base::kFeatures, Base::kChunks, Base::kRowsAtOnce;
  using Base::p, Base::ranged, Base::floats, Base::pointers, Base::numbers, Base::reverse;
  using typename Base::L, typename Base::R, typename Base::N, typename Base::QueryTile;

  // The reverse state after the split, of the elements of R that this thread adds it to.
  struct After {
    uint4 x[kFeatures / kRowsAtOnce];
  };
  PERFORMER_DEVICE void LoadAfter(After& after, int first, int tid) const {
    const int row = tid / kChunks, column = tid % kChunks * kChunk<N>;
    const N* const from = pointers()->after + static_cast<int64_t>(first + row) * W + column;
#pragma unroll
    for (int n = 0; n < kFeatures / kRowsAtOnce; ++n)
      after.x[n] = *reinterpret_cast<const uint4*>(from + n * kRowsAtOnce * W);
  }
  // What R and r after the split are multiplied by, relative to what the checkpoint is: at most 1.
  PERFORMER_DEVICE float Keep(int feature, int stage) const {
    const float reference = numbers(stage, kReference)[feature];
    if (reference == kInfinity) return 0.f;
    return Exp2((reference - numbers(stage, kAfterLogMass)[feature]) * p.map.unit());
  }
  // R and r += those after the split.
  PERFORMER_DEVICE void AddAfter(const After& after, int stage, int tid) const {
    tid = Opaque(tid);
    const int row = tid / kChunks, column = tid % kChunks * kChunk<N>;
#pragma unroll
    for (int n = 0; n < kFeatures / kRowsAtOnce; ++n) {
      const int r = row + n * kRowsAtOnce, at = At<N, W>(r, column);
      float factor = 1.f, after_factor = Keep(r, stage);
      if constexpr (kIs16Bit<T>) {
        factor = numbers(stage, kFactor)[r];
        after_factor *= numbers(stage, kAfterFactor)[r];
      }
      uint4& chunk = *reinterpret_cast<uint4*>(reverse(stage) + at);
      float x[kChunk<N>], more[kChunk<N>];
      UnpackChunk<N>(x, chunk, factor);
      UnpackChunk<N>(more, after.x[n], after_factor);
#pragma unroll
      for (int i = 0; i < kChunk<N>; ++i) x[i] += more[i];
      if constexpr (kIs16Bit<T>) {
        const HalfScale scale = ScaleOfHalf(kLargestHalf * (factor + after_factor));
        chunk = PackChunk<Half>(x, scale.to_half);
        const int in_slice = column - Base::begin();
        if (kSlices<W> == 1 || (in_slice >= 0 && in_slice < kSlice<W>))
          *reinterpret_cast<uint4*>(ranged(L::kRangedReverse) + At<R, kSlice<W>>(r, in_slice)) =
              PackChunk<R>(x, 1.f);
        if (tid % kChunks == 0) floats(L::kReverseFactor)[r] = scale.from_half;
      } else {
        chunk = PackChunk<N>(x, 1.f);
      }
    }
    if (tid < kFeatures)
      numbers(stage, kMass)[tid] += Keep(tid, stage) * numbers(stage, kAfterMass)[tid];
  }

  // With advances(): f of the next tile's queries, relative to the same, to shared memory, and the
  // sums over the warp's queries of f and f delta.
  PERFORMER_DEVICE R* next_features() const {
    return ranged(L::kQueryFeatures) + kFeatures * kTile;
  }
  PERFORMER_DEVICE float* next_sums(int half, int which) const {
    return floats(L::kNextSums) + (half * 2 + which) * kFeatures;
  }
  PERFORMER_DEVICE void StoreNextFeatures(const float (&base)[2], int first, int head, int warp,
                                          int lane) const {
    QueryTile x;
    Base::QueryLogWeights(x, base, first, head, warp, lane, true);
    const float* const delta = floats(L::kNextDelta) + Query0(warp) + 2 * (lane % 4);
    float sum[2] = {}, mass[2] = {};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      R* const to = next_features() +
                    AtPair<R, kTile>(Feature0(warp) + lane / 4, Query0(warp) / 8 + n, lane % 4);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        // As the operand is rounded: its errors cancel in R . v - r.
        const uint32_t pair = Pack<R>(Exp2(x[n][2 * e]), Exp2(x[n][2 * e + 1]));
        *Pair(to + 8 * e * kTile) = pair;
        sum[e] += Low<R>(pair) + High<R>(pair);
        mass[e] += Low<R>(pair) * delta[n * 8] + High<R>(pair) * delta[n * 8 + 1];
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float all = QuadSum(sum[e]), all_mass = QuadSum(mass[e]);
      const int feature = Feature0(warp) + lane / 4 + 8 * e;
      if (lane % 4 == 0) {
        next_sums(Query0(warp) / 32, 0)[feature] = all;
        next_sums(Query0(warp) / 32, 1)[feature] = all_mass;
      }
    }
  }
  // R and r become those after the tile: of the checkpoint and of what follows the split
  // (with_rest), and of the next tile's queries. A warp has 16 features and 32 columns.
  PERFORMER_DEVICE void Advance(int first, bool with_rest, int stage, int warp, int lane) const {
    const int g = lane / 4, t = lane % 4, feature0 = Feature0(warp), column0 = Query0(warp);
    static_assert(L::kWarps / (kFeatures / 16) * 32 == W || !L::kAdvances);
    float sum[4][4] = {};
#pragma unroll
    for (int s = 0; s < kTile / 16; ++s) {
      uint32_t a[kFragment<R>];
      LoadA<R, kTile>(a, next_features(), feature0, s * 16, lane);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint32_t b[kFragment<R>];
        LoadBTrans<R, W>(b, ranged(L::kGradOut), s * 16, column0 + n * 16, lane);
        Mma<R>(sum[2 * n], sum[2 * n + 1], a, b);
      }
    }
    float largest = 0;
#pragma unroll
    for (int i = 0; i < L::kWarps; ++i) largest = fmaxf(largest, floats(L::kLargest)[i]);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int r = feature0 + g + 8 * e;
      const float reference = floats(L::kStateReference)[r];
      const float keep = with_rest && reference != kInfinity
                             ? Exp2((reference - numbers(stage, kReference)[r]) * p.map.unit())
                             : 0.f;
      const float after_keep = keep * Keep(r, stage);
      const float factor = keep * numbers(stage, kFactor)[r];
      const float after_factor = after_keep * numbers(stage, kAfterFactor)[r];
      const float bound = kLargestHalf * (factor + after_factor) +
                          largest * (next_sums(0, 0)[r] + next_sums(1, 0)[r]);
      const HalfScale scale = ScaleOfHalf(bound);
      const N* const after =
          pointers()->after + static_cast<int64_t>(first + r) * W + column0 + 2 * t;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int at = AtPair<N, W>(feature0 + g, column0 / 8 + n, t) + 8 * e * W;
        float2 x = {sum[n][2 * e], sum[n][2 * e + 1]};
        if (with_rest) {
          const float2 mine = LoadPair(reverse(stage) + at), more = LoadPair(after + n * 8);
          x.x += factor * mine.x + after_factor * more.x;
          x.y += factor * mine.y + after_factor * more.y;
        }
        StorePair(reverse(stage) + at, scale.to_half * x.x, scale.to_half * x.y);
        StorePair(ranged(L::kRangedReverse) + at, x.x, x.y);
      }
      if (column0 == 0 && t == 0) {
        floats(L::kReverseFactor)[r] = scale.from_half;
        float& mass = numbers(stage, kMass)[r];
        mass = next_sums(0, 1)[r] + next_sums(1, 1)[r] +
               (with_rest ? keep * mass + after_keep * numbers(stage, kAfterMass)[r] : 0.f);
      }
    }
  }
};

}  // namespace cuda
}  // namespace performer
