// What the causal kernel (causal/causal.cuh) does for the query rows of its tile.
#pragma once
#include "cuda/device/poison.cuh"
#include "cuda/kernels/causal/keys.cuh"

namespace performer {
namespace cuda {

template <class T, int W>
struct CausalBlock : CausalKeys<T, W, CausalLayout<T, W>> {
  using Base = CausalKeys<T, W, CausalLayout<T, W>>;
  using L = typename Base::L;
  using Base::kKeyTiles, Base::kColumns;
  using Base::p, Base::shared, Base::floats, Base::pointers, Base::tile;
  static constexpr int kFeatureTiles = L::kFeatures / 8;  // in columns of 8

  // Sums of 16 queries over the features so far, relative to exp(row_max).
  struct Sums {
    float num[kColumns][4], local[kKeyTiles][4];
    float row_max[2], den[2];  // den: this lane's share

    PERFORMER_DEVICE void Init() {
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) num[n][i] = 0.f;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) local[n][i] = 0.f;
#pragma unroll
      for (int e = 0; e < 2; ++e) row_max[e] = -kInfinity, den[e] = 0.f;
    }

    PERFORMER_DEVICE void Rescale(const float (&factor)[2]) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) num[n][i] *= factor[i / 2];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) local[n][i] *= factor[i / 2];
#pragma unroll
      for (int e = 0; e < 2; ++e) den[e] *= factor[e];
    }
  };

  // One step of online softmax over a feature block, for those of the warp's rows (from row0 on)
  // that lie in the sub-chunk [begin, end).
  PERFORMER_DEVICE void Queries(Sums& sums, const T* projection, const T* state, int row0,
                                int begin, int end, int lane) const {
    lane = Opaque(lane);
    float y[kFeatureTiles][4];
    QueryLogits(y, projection, row0, lane);
    if (begin > 0 || end < kTile) HideRows(y, row0, begin, end, lane);
    const float unit = p.map.unit();
    bool grew = false;
    float factor[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float row_max = sums.row_max[e];
#pragma unroll
      for (int n = 0; n < kFeatureTiles; ++n)
        row_max = fmaxf(row_max, fmaxf(y[n][2 * e], y[n][2 * e + 1]));
      row_max = QuadMax(row_max);
      grew |= row_max > sums.row_max[e];
      factor[e] = Exp2((sums.row_max[e] - ZeroIfNone(row_max)) * unit);
      sums.row_max[e] = row_max;
    }
    // Skipping a multiplication by 1 changes no bit.
    if (__any_sync(kAllLanes, grew)) sums.Rescale(factor);
    const float* const mass = floats(L::kMass);
#pragma unroll
    for (int n = 0; n < kFeatureTiles; ++n) {
      const float2 of_feature = LoadPair(mass + n * 8 + 2 * (lane % 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& f = y[n][i];
        f = Exp2((f - ZeroIfNone(sums.row_max[i / 2])) * unit);
        sums.den[i / 2] += f * (i & 1 ? of_feature.y : of_feature.x);
      }
    }
#pragma unroll
    for (int s = 0; s < kFeatureTiles / 2; ++s) {
      uint32_t a[kFragment<T>];
      PackA<T>(a, y[2 * s], y[2 * s + 1]);
#pragma unroll
      for (int n = 0; n < kColumns / 2; ++n) {
        uint32_t b[kFragment<T>];
        LoadBTrans<T, W>(b, state, s * 16, n * 16, lane);
        Mma<T>(sums.num[2 * n], sums.num[2 * n + 1], a, b);
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles / 2; ++n) {
        if (n * 16 > row0) continue;  // above the triangle
        uint32_t b[kFragment<T>];
        LoadBTrans<T, kTile>(b, tile(L::kWeights), s * 16, n * 16, lane);
        Mma<T>(sums.local[2 * n], sums.local[2 * n + 1], a, b);
      }
    }
  }

  // Applies the causal mask (a selection), adds local v, divides, and writes the warp's rows.
  // values: of the tile, which has `rows` rows.
  PERFORMER_DEVICE void Write(Sums& sums, const T* values, const RowsOf<T>& out, int row0, int rows,
                              int lane) const {
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
          x = n * 8 + 2 * t + c <= row0 + g + 8 * e ? x : 0.f;
          local += x;
        }
      den[e] = QuadSum(sums.den[e] + local);
      inverse[e] = den[e] == 0.f ? 0.f : 1.f / den[e];  // 0: no key seen so far
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums.num[n][i] *= inverse[i / 2];
#pragma unroll
    for (int s = 0; s < kTile / 16; ++s) {
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
      for (int n = 0; n < kColumns / 2; ++n) {
        uint32_t b[kFragment<T>];
        LoadBTrans<T, W>(b, values, s * 16, n * 16, lane);
        Mma<T>(sums.num[2 * n], sums.num[2 * n + 1], a, b);
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = row0 + g + 8 * e;
      if (row >= rows) continue;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const int column = n * 8 + 2 * t;
        const auto value = [&](int c) {
          return poison[column + c] <= row ? NAN : inverse[e] == 0.f ? 0.f : sums.num[n][2 * e + c];
        };
        StoreColumns(pointers()->result + static_cast<int64_t>(row) * out.stride, column, out.width,
                     out.aligned, value(0), value(1));
      }
    }
  }

 private:
  // y = a of the warp's queries and the features of a block, plus anchor and feature bias.
  PERFORMER_DEVICE void QueryLogits(float (&y)[kFeatureTiles][4], const T* projection, int row0,
                                    int lane) const {
    const int t = lane % 4;
    const float* const anchor = floats(L::kAnchor);
    const bool linear = p.map.linear();
    if (linear)
      SetRows(y, anchor + 2 * t);
    else
      SetZero(y);
#pragma unroll
    for (int s = 0; s < W / 16; ++s) {
      uint32_t a[kFragment<T>];
      LoadA<T, W>(a, tile(L::kQuery), row0, s * 16, lane);
#pragma unroll
      for (int n = 0; n < kFeatureTiles / 2; ++n) {
        uint32_t b[kFragment<T>];
        LoadB<T, W>(b, projection, n * 16, s * 16, lane);
        Mma<T>(y[2 * n], y[2 * n + 1], a, b);
      }
    }
    if (!linear) MapLogits(y, p.map, anchor, t);
  }

  PERFORMER_DEVICE static void HideRows(float (&y)[kFeatureTiles][4], int row0, int begin, int end,
                                        int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + lane / 4 + 8 * (i / 2);
      if (row < begin || row >= end)
#pragma unroll
        for (int n = 0; n < kFeatureTiles; ++n) y[n][i] = -kInfinity;
    }
  }
};

}  // namespace cuda
}  // namespace performer
