// Gradient of causal attention with respect to queries, in tiles of kTile rows side by side, as the
// forward pass takes them (causal/causal.cuh). What a row's weights sum to, and its delta, come out
// of the same sums, so that no output is computed again. A block walks the features in blocks of 64,
// with online softmax:
//
//   once      dG                                           tile_gradient.cuh
//   keys      kb, and the state before the tile            as in the forward pass
//   queries   f = exp(w q + anchor - row_max)
//             x' = x - centre z
//             px += (f x' slope) w      pz += (f z slope) w      sx += f x' 1      sz += f z 1
//
// and after the last feature block
//
//   delta = centre + sx / sz     log-sum-exp = row_max + log sz     dq = root (px - sx / sz pz) / sz
//
// The centre of a row is its delta by the first features that weigh anything. It takes out of x much of
// what cancels in dq. In 16 bits the operands f x' and f z are rounded, and dq takes the sums of the
// rounded ones, so that the errors of a feature that weighs most cancel too. (Where slopes come in
// between they do not, but there no feature weighs most.) The key side, which rounds in other ways,
// gets delta and sz of the others.
//
// Grid: (tiles of all sequences, query heads, slices).
#pragma once
#include "cuda/kernels/causal_backward/tile_gradient.cuh"

namespace performer {
namespace cuda {

template <class T>
struct CausalQueryGradientParams : CausalTileGradientParams<T> {
  Projection<Ranged<T>> ranged_projection;                         // of queries
  RowsOf<T> grad_query;                                            // [B L, H, D]
  float *row_max = nullptr, *log_sum = nullptr, *delta = nullptr;  // see RowStatistics
};

template <class T>
struct CausalQueryGradientPointers : CausalTileGradientPointers<T> {
  const Ranged<T>* ranged_projection;  // [M_pad, W], from the block's slice on
};

template <class T, int W>
struct CausalQueryGradientLayout : CausalTileGradientLayout<T, W> {
  using S = CausalTileGradientLayout<T, W>;
  // Of feature blocks, as in CausalLayout. Two blocks of wide rows fit into a multiprocessor instead.
  static constexpr int kStages = kIs16Bit<T> && W == 64 ? 2 : 1;

  // The columns of the projection as an operand in the type R: of all, or of the slice.
  static constexpr int kRangedColumns = kHasRanged<T> ? kSlice<W> : W;

  // Shared memory, in bytes.
  static constexpr int kStageBytes = kStages * S::kFeatureBytes;  // [kStages] of [kFeatures][W]
  static constexpr int kRangedBytes = S::kFeatureBytes / W * kRangedColumns;  // of a stage
  static constexpr int kRangedProjection = S::kProjection + (kHasRanged<T> ? kStageBytes : 0);
  static constexpr int kState = kRangedProjection + kStages * kRangedBytes;
  static constexpr int kWeights = kState + kStageBytes;       // kb [kFeatures][kTile]
  static constexpr int kValue = kWeights - S::kFeatureBytes;  // [kTile][W], before the features
  static constexpr int kAnchor = kWeights + S::kFeatures * kTile * S::kSize;  // float [kFeatures]
  static constexpr int kMass = kAnchor + S::kFeatures * 4;  // float [kMassRows][kFeatures]
  static constexpr int kShares = kMass + S::kMassRows * S::kFeatures * 4;  // float2 [kFeatures]
  static constexpr int kCuts = kShares + S::kFeatures * 8;                 // int [kWarps]
  static constexpr int kStream = kCuts + S::kWarps * 4;
  static constexpr int kPointers = kStream + KeyStream<T, W, S::kThreads>::kSharedBytes;
  static constexpr int kBytes =
      kPointers + static_cast<int>(sizeof(CausalQueryGradientPointers<T>));
  static_assert(kStream % 8 == 0 && kPointers % 8 == 0 && kBytes <= MaxSharedBytes(W, S::kWarps));
};

template <class T, int W>
struct CausalQueryGradientBlock
    : CausalTileGradientBlock<T, W, CausalQueryGradientLayout<T, W>, CausalQueryGradientParams<T>,
                              CausalQueryGradientPointers<T>> {
  using Base =
      CausalTileGradientBlock<T, W, CausalQueryGradientLayout<T, W>, CausalQueryGradientParams<T>,
                              CausalQueryGradientPointers<T>>;
  using Base::Base, Base::kStep;
  using Base::p, Base::tile, Base::ranged, Base::floats, Base::pointers;
  using typename Base::L, typename Base::R, typename Base::Step, typename Base::Pairs;

  static constexpr int kColumns = kSlice<W> / 8;  // accumulators of a row of 16 queries

  PERFORMER_DEVICE static int begin() { return SliceBegin<W>(blockIdx.z); }

  // Sums of 16 queries over the features so far, relative to exp(row_max).
  struct Sums {
    float px[kColumns][4], pz[kColumns][4];
    // This lane's shares; those of operands as they are rounded, in 16 bits.
    float sx[2], sz[2], rounded_x[2], rounded_z[2];
    float row_max[2], centre[2];

    PERFORMER_DEVICE void Init() {
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) px[n][i] = pz[n][i] = 0.f;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        sx[e] = sz[e] = rounded_x[e] = rounded_z[e] = centre[e] = 0.f;
        row_max[e] = -kInfinity;
      }
    }

    PERFORMER_DEVICE void Rescale(const float (&factor)[2]) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) px[n][i] *= factor[i / 2], pz[n][i] *= factor[i / 2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        sx[e] *= factor[e], sz[e] *= factor[e];
        rounded_x[e] *= factor[e], rounded_z[e] *= factor[e];
      }
    }
  };

  // By one thread.
  PERFORMER_DEVICE void StorePointers(const WorkTile& work) const {
    const int64_t head = blockIdx.y, heads = p.query.heads, group = head / (heads / p.groups);
    *pointers() = {MakeCausalTileGradientPointers<T, W>(p, work, blockIdx.x, p.grad_query),
                   p.ranged_projection.At(QueryHeadIndex(p.projection.heads, head, heads, group),
                                          p.features_pad, W) +
                       begin()};
  }

  // Starts copying the operands of the feature block from `first` on.
  PERFORMER_DEVICE void Issue(int first, int buffer, int tid) const {
    constexpr int kThreads = L::kThreads;
    const int64_t at = static_cast<int64_t>(first) * W;
    const int skipped = buffer * L::kFeatureBytes;
    CopyOperand<T, W, L::kFeatures, kThreads>(tile(L::kProjection + skipped),
                                              pointers()->projection + at, tid);
    if constexpr (kHasRanged<T>)
      CopyOperand<R, W, L::kFeatures, kThreads, L::kRangedColumns>(
          ranged(L::kRangedProjection + buffer * L::kRangedBytes),
          pointers()->ranged_projection + at, tid);
    Base::IssueState(tile(L::kState + skipped), first, tid);
    CpAsyncCommit();
  }

  // Takes a feature block for those of the warp's rows (from row0 on, of `rows` in the tile) that lie
  // in the sub-chunk [begin, end).
  PERFORMER_DEVICE void Queries(Sums& sums, const Pairs& pairs, int buffer, int row0, int rows,
                                int begin, int end, int lane) const {
    const int skipped = buffer * L::kFeatureBytes;
    const bool some = begin > 0 || end < kTile;
#pragma unroll 1
    for (int first = 0; first < L::kFeatures; first += kStep) {
      lane = Opaque(lane);
      const T* const projection = tile(L::kProjection + skipped) + first * W;
      Step f, x, z;
      Base::TakeQueries(row0, rows, lane);
      Base::QueryProduct(f, projection, floats(L::kAnchor) + first, row0, lane);
      if (some)
#pragma unroll
        for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            f[n][i] = Base::IsHidden(i, row0, begin, end, lane) ? -kInfinity : f[n][i];
      bool is_first[2];
      Weigh(f, sums, is_first);
      Base::TakeGradOut(row0, rows, lane);
      Base::Gains(x, z, pairs, ranged(L::kState + skipped) + first * W, first, row0, lane);
      if (some)
#pragma unroll
        for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (Base::IsHidden(i, row0, begin, end, lane)) x[n][i] = z[n][i] = 0.f;
      if (__any_sync(kAllLanes, is_first[0] || is_first[1])) Centre(sums, f, x, z, is_first);
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          x[n][i] = f[n][i] * (x[n][i] - sums.centre[i / 2] * z[n][i]);
          z[n][i] *= f[n][i];
          sums.sx[i / 2] += x[n][i];
          sums.sz[i / 2] += z[n][i];
        }
      if (!p.map.linear()) {
        Base::TakeQueries(row0, rows, lane);
        Step slope;
        Base::Slopes(slope, projection, row0, lane);
#pragma unroll
        for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) x[n][i] *= slope[n][i], z[n][i] *= slope[n][i];
      }
      SumFeatures(
          sums, x, z,
          ranged(L::kRangedProjection + buffer * L::kRangedBytes) + first * L::kRangedColumns,
          lane);
    }
  }

  // Divides, and stores the gradient and the statistics of the warp's rows.
  PERFORMER_DEVICE void Write(const Sums& sums, int row0, int rows, int lane) const {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float sz = QuadSum(sums.sz[e]), sx = QuadSum(sums.sx[e]);
      float rounded_x = 0, rounded_z = 0;
      if constexpr (kIs16Bit<R>)
        rounded_x = QuadSum(sums.rounded_x[e]), rounded_z = QuadSum(sums.rounded_z[e]);
      const int row = row0 + g + 8 * e;
      if (row >= rows) continue;
      const bool any = sz != 0.f;  // else no key was seen so far
      float rest = any ? sx / sz : 0.f, factor = any ? p.map.root / sz : 0.f;
      if (begin() == 0 && t == 0) {
        const int64_t line = pointers()->line + row * p.query.heads;
        StoreStatistics<T>(sums.row_max[e], sz, p.map.unit(), line, p.row_max, p.log_sum);
        p.delta[line] = any ? sums.centre[e] + rest : 0.f;
      }
      if constexpr (kIs16Bit<T>)
        if (any && p.map.linear()) {
          rest = rounded_x / rounded_z;
          factor = p.map.root / rounded_z;
        }
      T* const to = pointers()->result + static_cast<int64_t>(row) * p.grad_query.stride;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const auto value = [&](int c) {
          const int i = 2 * e + c;
          return any ? (sums.px[n][i] - rest * sums.pz[n][i]) * factor : 0.f;
        };
        StoreColumns(to, begin() + n * 8 + 2 * t, p.grad_query.width, p.grad_query.aligned,
                     value(0), value(1));
      }
    }
  }

 private:
  // One step of online softmax: log-features become features. is_first: of a row, whether these are
  // the first ones that weigh anything.
  PERFORMER_DEVICE void Weigh(Step& y, Sums& sums, bool (&is_first)[2]) const {
    const float unit = p.map.unit();
    bool grew = false;
    float factor[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float row_max = sums.row_max[e];
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n)
        row_max = fmaxf(row_max, fmaxf(y[n][2 * e], y[n][2 * e + 1]));
      row_max = QuadMax(row_max);
      grew |= row_max > sums.row_max[e];
      is_first[e] = sums.row_max[e] == -kInfinity && row_max != -kInfinity;
      factor[e] = Exp2((sums.row_max[e] - ZeroIfNone(row_max)) * unit);
      sums.row_max[e] = row_max;
    }
    // Skipping a multiplication by 1 changes no bit.
    if (__any_sync(kAllLanes, grew)) sums.Rescale(factor);
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        y[n][i] = Exp2((y[n][i] - ZeroIfNone(sums.row_max[i / 2])) * unit);
  }

  PERFORMER_DEVICE static void Centre(Sums& sums, const Step& f, const Step& x, const Step& z,
                                      const bool (&is_first)[2]) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sx = 0, sz = 0;
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          sx += f[n][2 * e + c] * x[n][2 * e + c];
          sz += f[n][2 * e + c] * z[n][2 * e + c];
        }
      sx = QuadSum(sx), sz = QuadSum(sz);
      if (is_first[e] && sz > 0.f) sums.centre[e] = sx / sz;
    }
  }

  // px, pz and the sums of the rounded operands.
  PERFORMER_DEVICE static void SumFeatures(Sums& sums, const Step& x, const Step& z,
                                           const R* projection, int lane) {
    const int c0 = L::kRangedColumns == W ? begin() : 0;
#pragma unroll
    for (int s = 0; s < kStep / 16; ++s) {
      lane = Opaque(lane);
      uint32_t of_x[kFragment<R>], of_z[kFragment<R>];
      PackA<R>(of_x, x[2 * s], x[2 * s + 1]);
      PackA<R>(of_z, z[2 * s], z[2 * s + 1]);
      if constexpr (kIs16Bit<R>) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          sums.rounded_x[e] += OperandSum<R>(of_x, e);
          sums.rounded_z[e] += OperandSum<R>(of_z, e);
        }
      }
#pragma unroll
      for (int n = 0; n < kColumns / 2; ++n) {
        uint32_t b[kFragment<R>];
        LoadBTrans<R, L::kRangedColumns>(b, projection, s * 16, c0 + n * 16, lane);
        Mma<R>(sums.px[2 * n], sums.px[2 * n + 1], of_x, b);
        Mma<R>(sums.pz[2 * n], sums.pz[2 * n + 1], of_z, b);
      }
    }
  }
};

template <class T, int W>
__global__ void __launch_bounds__(128, 2)
    CausalQueryGradientKernel(CausalQueryGradientParams<T> p) {
  using Block = CausalQueryGradientBlock<T, W>;
  using L = typename Block::L;
  constexpr int kThreads = L::kThreads;
  PERFORMER_SHARED_MEMORY(shared);
  const int tid = threadIdx.x;
  // From a shuffle, so that branches on it are known to be the same for the whole warp.
  const int warp = __shfl_sync(kAllLanes, tid / 32, 0), lane = tid % 32, row0 = warp * 16;
  const Block block(p, shared);
  const WorkTile work = GetWorkTile(p.work, blockIdx.x);
  if (tid == 0) block.StorePointers(work);
  KeyStream<T, W, kThreads> stream(p.keys, p.map, work, blockIdx.y / (p.query.heads / p.groups),
                                   shared + L::kStream, tid);
  block.LoadMasks(stream, tid);
  __syncthreads();  // the mask of the keys is visible
  const int rows = stream.pointers->rows, features = static_cast<int>(p.features_pad);
  block.IssueRows(rows, tid);
  block.IssueKeys(stream, tid);
  if constexpr (L::kStages == 2) block.Issue(0, 0, tid);
  typename Block::Features own;
  // The next feature block's are loaded ahead where registers allow.
  if constexpr (Block::kHolds) block.Load(own, warp * 16, lane);
  CpAsyncWait<0>();
  block.FinishKeys(stream, tid);
  block.MakeRowsRanged(tid);
  __syncthreads();  // the rows are complete
  typename Block::Pairs pairs;
  block.PairGradients(pairs, row0, lane);
  typename Block::Sums sums;
  sums.Init();

#pragma unroll 1
  for (int first = 0; first < features; first += L::kFeatures) {
    const int buffer = L::kStages == 2 ? first / L::kFeatures & 1 : 0;
    if constexpr (L::kStages == 1) {
      __syncthreads();  // nobody reads the last feature block any more
      block.Issue(first, 0, tid);
    }
    if constexpr (!Block::kHolds) block.Load(own, first + warp * 16, lane);
    CpAsyncWait<0>();
    __syncthreads();  // the feature block is complete; the other buffer is free
    const bool last = first + L::kFeatures >= features;
    if (L::kStages == 2 && !last) block.Issue(first + L::kFeatures, buffer ^ 1, tid);

    T* const state = block.tile(L::kState + buffer * L::kFeatureBytes);
    block.WalkSubChunks(state, own, stream.bias, rows, first, warp, lane, [&](int begin, int end) {
      if (Block::kHolds && end >= rows && !last)
        block.Load(own, first + L::kFeatures + warp * 16, lane);
      block.Queries(sums, pairs, buffer, row0, rows, begin, end, lane);
    });
  }
  block.Write(sums, row0, rows, lane);
}

}  // namespace cuda
}  // namespace performer
