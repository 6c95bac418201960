// The softmax over features of 32 tokens, in a block whose warps have all features between them. Each
// warp takes the exponentials of its own, relative to the largest of these; what they sum to goes
// through shared memory, where every warp finds the sums of all.
//
// Of the accumulators a lane has tokens 8 n + 2 t + c. What is known of a token is kept by one lane:
// that of token 8 n + 2 t + c by lane 4 (2 n + c) + t.
#pragma once
#include "cuda/kernels/backward/common.cuh"

namespace performer {
namespace cuda {

// kPeak: the largest |g| is kept, for the scales of half.
template <int kWarps, bool kPeak>
class BlockSoftmax {
 public:
  // float4 [2][kWarps][32 lanes]: a tile has 64 tokens, of which each half has a place of its own.
  static constexpr int kBytes = 2 * kWarps * 32 * static_cast<int>(sizeof(float4));

  PERFORMER_DEVICE BlockSoftmax(unsigned char* shared, int half)
      : parts_(reinterpret_cast<float4*>(shared) + half * kWarps * 32) {}

  // Log-features x (in units of root) become exponentials relative to the warp's largest; these and
  // their products with g are summed. A barrier must follow.
  template <int kRowTiles>
  PERFORMER_DEVICE void TakeFeatures(BackwardTile<kRowTiles>& x, const BackwardTile<kRowTiles>& g,
                                     float unit, int tid) {
    const int lane = Opaque(tid % 32);
    float y[8], sum[8], weighted[8], peak = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      y[i] = -kInfinity;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int e = 0; e < 2; ++e) y[i] = fmaxf(y[i], x[m][i / 2][2 * e + i % 2]);
    }
    own_max_ = Reduce(y, lane, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float base = ZeroIfNone(OfToken(own_max_, i, lane));
      sum[i] = weighted[i] = 0.f;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& f = x[m][i / 2][2 * e + i % 2];
          const float of = g[m][i / 2][2 * e + i % 2];
          f = Exp2((f - base) * unit);
          sum[i] += f;
          weighted[i] += f * of;
          if constexpr (kPeak) peak = fmaxf(peak, fabsf(of));
        }
    }
    const auto add = [](float a, float b) { return a + b; };
    const float token_sum = Reduce(sum, lane, add), token_weighted = Reduce(weighted, lane, add);
    parts_[tid / 32 * 32 + lane] = float4{own_max_, token_sum, token_weighted, peak};
  }

  // Joins what all warps have. The tokens are rows first, first + 1, ... of `rows`.
  PERFORMER_DEVICE void Combine(int first, int rows, float unit, int tid) {
    const int lane = Opaque(tid % 32);
    float row_max = -kInfinity, sum = 0, weighted = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) row_max = fmaxf(row_max, parts_[w * 32 + lane].x);
    const float base = ZeroIfNone(row_max);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float4 part = parts_[w * 32 + lane];
      const float factor = Exp2((part.x - base) * unit);
      sum += factor * part.y;
      weighted += factor * part.z;
      if constexpr (kPeak) peak_ = fmaxf(peak_, part.w);
    }
    const int row = first + lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2;
    const float inverse = row < rows && sum != 0.f ? 1.f / sum : 0.f;
    // 0 where this warp's features have seen nothing.
    factor_ = inverse == 0.f ? 0.f : Exp2((own_max_ - base) * unit) * inverse;
    delta_ = inverse == 0.f ? 0.f : weighted * inverse;
  }

  // Of token 8 n + 2 t + c: what an exponential is multiplied by to be a weight, and sum_m P g.
  PERFORMER_DEVICE float Factor(int n, int c, int lane) const {
    return OfToken(factor_, 2 * n + c, lane);
  }
  PERFORMER_DEVICE float Delta(int n, int c, int lane) const {
    return OfToken(delta_, 2 * n + c, lane);
  }
  // The largest |g| of all tokens and features.
  PERFORMER_DEVICE float Peak() const { return WarpMax(peak_); }

 private:
  PERFORMER_DEVICE static float OfToken(float x, int i, int lane) {
    return __shfl_sync(kAllLanes, x, 4 * i + lane % 4);
  }
  // Joins x[2 n + c] of all lanes with the same t, to the lane of the token. Lanes exchange halves,
  // so that this takes 7 shuffles, not 24.
  template <class Join>
  PERFORMER_DEVICE static float Reduce(float (&x)[8], int lane, Join join) {
#pragma unroll
    for (int count = 4; count > 0; count /= 2) {
      const bool upper = (lane & 4 * count) != 0;
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const float kept = upper ? x[i + count] : x[i], given = upper ? x[i] : x[i + count];
        x[i] = join(kept, __shfl_xor_sync(kAllLanes, given, 4 * count));
      }
    }
    return x[0];
  }

  float4* const parts_;
  // Of this lane's token; of its share of all, for peak_.
  float own_max_ = 0, factor_ = 0, delta_ = 0, peak_ = 0;
};

}  // namespace cuda
}  // namespace performer
