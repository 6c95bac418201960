// What the causal kernel (causal/causal.cuh) does for the query rows of a chunk.
#pragma once
#include "cuda/kernels/causal/state.cuh"

namespace performer {
namespace cuda {

template <class T, int W, int kFeatureTiles, bool kSmall>
struct CausalBlock : CausalState<T, W, kFeatureTiles, kSmall> {
  using Base = CausalState<T, W, kFeatureTiles, kSmall>;
  using L = typename Base::L;
  using Base::C, Base::kKeyTiles, Base::kColumns;
  using Base::p, Base::shared, Base::floats, Base::pointers, Base::tile;
  static constexpr int kQueryTiles = L::kQueryTile / 8;  // of features, in columns of 8

  // Sums of 16 queries over some of the features, relative to exp(row_max).
  struct Sums {
    float num[kColumns][4], local[kKeyTiles][4], row_max[2], den[2];
  };

  // One step of online softmax, over kQueryTile features from `first` on.
  PERFORMER_DEVICE void Queries(Sums& sums, const T* queries, int row0, int first, int lane) const {
    const int t = lane % 4;
    const float *anchor = floats(L::kAnchor) + first, *mass = floats(L::kMass) + first;
    const bool linear = p.map.linear();
    float y[kQueryTiles][4];
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) y[n][i] = linear ? anchor[n * 8 + 2 * t + (i & 1)] : 0.f;
#pragma unroll
    for (int s = 0; s < W / 16; ++s) {
      uint32_t a[kFragment<T>];
      LoadA<T, W>(a, queries, row0, s * 16, lane);
#pragma unroll
      for (int n = 0; n < kQueryTiles / 2; ++n) {
        uint32_t b[kFragment<T>];
        LoadB<T, W>(b, tile(L::kProjection), first + n * 16, s * 16, lane);
        Mma<T>(y[2 * n], y[2 * n + 1], a, b);
      }
    }
    if (!linear) MapLogits(y, p.map, anchor, t);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float row_max = sums.row_max[e];
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n)
        row_max = fmaxf(row_max, fmaxf(y[n][2 * e], y[n][2 * e + 1]));
      row_max = QuadMax(row_max);
      const float base = ZeroIfNone(row_max),
                  factor = Exp2((sums.row_max[e] - base) * p.map.unit());
      sums.row_max[e] = row_max;
      sums.den[e] *= factor;
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int i = 2 * e; i < 2 * e + 2; ++i) sums.num[n][i] *= factor;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int i = 2 * e; i < 2 * e + 2; ++i) sums.local[n][i] *= factor;
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& f = y[n][2 * e + c];
          f = Exp2((f - base) * p.map.unit());
          sums.den[e] += f * mass[n * 8 + 2 * t + c];
        }
    }
#pragma unroll
    for (int s = 0; s < kQueryTiles / 2; ++s) {
      uint32_t a[kFragment<T>];
      PackA<T>(a, y[2 * s], y[2 * s + 1]);
#pragma unroll
      for (int n = 0; n < kColumns / 2; ++n) {
        uint32_t b[kFragment<T>];
        LoadBTrans<T, W>(b, tile(L::kBefore), first + s * 16, n * 16, lane);
        Mma<T>(sums.num[2 * n], sums.num[2 * n + 1], a, b);
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles / 2; ++n) {
        if (n * 16 > row0) continue;  // above the triangle
        uint32_t b[kFragment<T>];
        LoadBTrans<T, C>(b, tile(L::kWeights), first + s * 16, n * 16, lane);
        Mma<T>(sums.local[2 * n], sums.local[2 * n + 1], a, b);
      }
    }
  }

  // Adds the sums of two peers, each over its half of the features. own_num receives the half of
  // num's columns that this warp will write.
  static constexpr int kOwnColumns = kColumns / 2;
  PERFORMER_DEVICE void Exchange(Sums& sums, float (&own_num)[kOwnColumns][4], int warp, int part,
                                 int lane) const {
    constexpr int kLocal = 4 * kKeyTiles, kEach = L::kExchangeFloats;
    __syncthreads();  // [4] everybody is done with kb and the old state
    float* const to = floats(L::kExchange) + warp * kEach * 32 + lane;
    const float* const from = floats(L::kExchange) + (L::kWarps - 1 - warp) * kEach * 32 + lane;
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) to[(4 * n + i) * 32] = sums.local[n][i];
#pragma unroll
    for (int n = 0; n < kOwnColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float low = sums.num[n][i], high = sums.num[kOwnColumns + n][i];
        own_num[n][i] = part ? high : low;
        to[(kLocal + 4 * n + i) * 32] = part ? low : high;
      }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      to[(kEach - 4 + e) * 32] = sums.row_max[e];
      to[(kEach - 2 + e) * 32] = sums.den[e];
    }
    __syncthreads();  // [5] the peer's sums are visible
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float peer_max = from[(kEach - 4 + e) * 32];
      const float row_max = fmaxf(sums.row_max[e], peer_max), base = ZeroIfNone(row_max);
      const float a = Exp2((sums.row_max[e] - base) * p.map.unit()),
                  b = Exp2((peer_max - base) * p.map.unit());
      sums.row_max[e] = row_max;
      // In the order of the features, whichever peer adds.
      const auto both = [&](float x, float y) { return part ? b * y + a * x : a * x + b * y; };
      sums.den[e] = both(sums.den[e], from[(kEach - 2 + e) * 32]);
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int i = 2 * e; i < 2 * e + 2; ++i)
          sums.local[n][i] = both(sums.local[n][i], from[(4 * n + i) * 32]);
#pragma unroll
      for (int n = 0; n < kOwnColumns; ++n)
#pragma unroll
        for (int i = 2 * e; i < 2 * e + 2; ++i)
          own_num[n][i] = both(own_num[n][i], from[(kLocal + 4 * n + i) * 32]);
    }
  }

  // Applies the causal mask (a selection), adds local v, divides, and writes rows [begin, end) of
  // the chunk, which begins at row `row` of the split.
  PERFORMER_DEVICE void Write(Sums& sums, float (&own_num)[kOwnColumns][4], const T* values,
                              int row0, int part, int begin, int end, int row, int lane) const {
    const int g = lane / 4, t = lane % 4;
    const int* poison = reinterpret_cast<const int*>(shared + L::kPoison);
    float inverse[2], den[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float local = 0;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = sums.local[n][2 * e + c];
          x = n * 8 + 2 * t + c <= row0 + g + 8 * e ? x : 0.f;  // kb is 0 outside the sub-chunk
          local += x;
        }
      den[e] = QuadSum(sums.den[e] + local);
      inverse[e] = den[e] == 0.f ? 0.f : 1.f / den[e];  // 0: no key seen so far
    }
#pragma unroll
    for (int n = 0; n < kOwnColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) own_num[n][i] *= inverse[i / 2];
#pragma unroll
    for (int s = 0; s < C / 16; ++s) {
      if (s * 16 > row0) continue;  // above the triangle
      // Now they are weights of a mean, at most 1: half holds them, however large kb was.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums.local[2 * s][i] *= inverse[i / 2];
        sums.local[2 * s + 1][i] *= inverse[i / 2];
      }
      uint32_t a[kFragment<T>];
      PackA<T>(a, sums.local[2 * s], sums.local[2 * s + 1]);
#pragma unroll
      for (int n = 0; n < kOwnColumns / 2; ++n) {
        uint32_t b[kFragment<T>];
        LoadBTrans<T, W>(b, values, s * 16, part * (W / 2) + n * 16, lane);
        Mma<T>(own_num[2 * n], own_num[2 * n + 1], a, b);
      }
    }
    const int64_t head = blockIdx.y;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int r = row0 + g + 8 * e;
      if (r < begin || r >= end) continue;
      const int64_t line = (pointers()->row + row + r) * p.query.heads + head;  // of [rows, H]
      if (p.row_max != nullptr && t == 0 && part == 0) {
        const int64_t at = blockIdx.z * p.part_rows + line;
        p.row_max[at] = den[e] == 0.f ? -kInfinity : sums.row_max[e];
        p.log_sum[at] = den[e] == 0.f ? 0.f : log2f(den[e]);
      }
#pragma unroll
      for (int n = 0; n < kOwnColumns; ++n) {
        const int column = part * (W / 2) + n * 8 + 2 * t;
        const auto value = [&](int c) {
          return poison[column + c] <= row + r ? NAN
                 : inverse[e] == 0.f           ? 0.f
                                               : own_num[n][2 * e + c];
        };
        if (p.part_out != nullptr) {
          float* to = p.part_out + blockIdx.z * p.part_size + line * W + column;
          *reinterpret_cast<float2*>(to) = float2{value(0), value(1)};
        } else {
          StoreColumns(pointers()->out + static_cast<int64_t>(row + r) * p.out.stride, column,
                       p.out.width, p.out.aligned, value(0), value(1));
        }
      }
    }
  }
};

}  // namespace cuda
}  // namespace performer
