// Gradient of near-and-far attention with respect to queries, in the tiles of the forward pass
// (near_far/near_far.cuh). Delta comes out of the same sums, so that no output is computed again. A
// block walks the features and then its near keys, of which the columns are w or k:
//
//   P = exp(logit - lse)      x' = grad_out . value - centre
//   px += (P x') columns      pz += P columns      sx += P x'      sz += P
//
// and after the last step
//
//   rest = sx / sz - grad_log_weight      delta = centre + rest
//   dq = (root (far terms) + root^2 (near terms) of px - rest pz) / sz
//         - root^2 q (the sum of dlogit over features)
//
// The centre of a row is its delta by the first columns that weigh anything. It takes out of x'
// much of what cancels in dq. In 16 bits the operands P x' and P are rounded, and dq takes the sums
// of the rounded ones, so that the errors of a column that weighs most cancel too. The key side,
// which rounds in other ways, gets delta and sz of the others.
//
// Nothing of a later row may change a bit of an earlier one. Where the tile's own keys are columns,
// those that are not finite are replaced by 0, and the rows from the first one of these on are NaN.
//
// Grid: (tiles of all blocks, query heads, slices).
#pragma once
#include "cuda/device/poison.cuh"
#include "cuda/kernels/near_far_backward/value_origin.cuh"

namespace performer {
namespace cuda {

template <class T>
struct NearFarQueryGradientParams : NearFarStepsParams<T> {
  RowsOf<const T> grad_out;                // [B L, H, E]
  const float* log_weight = nullptr;       // [B L, H]
  const float* grad_log_weight = nullptr;  // likewise
  NearFarOrigins origins;
  RowsOf<T> grad_query;  // [B L, H, D]
  NearFarStatistics statistics;
};

template <class T, int W, bool kBoth>
struct NearFarQueryGradientLayout {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static_assert(kTile == 16 * kWarps && kTile == kFeatureUnit, "a warp has 16 queries");
  // As in NearFarLayout. Two blocks of wide rows fit into a multiprocessor instead.
  static constexpr int kStages = kIs16Bit<T> && W == 64 ? 2 : 1;
  static constexpr bool kCopiesBehind = W * sizeof(T) <= 256;
  static constexpr int kBiases = 4;

  // Shared memory, in bytes.
  static constexpr int kTileBytes = kTile * W * static_cast<int>(sizeof(T));
  static constexpr int kQuery = 0;
  static constexpr int kGradOut = kTileBytes;
  static constexpr int kColumns = kGradOut + kTileBytes;
  static constexpr int kValues = kColumns + kStages * kTileBytes;
  static constexpr int kBehind = kValues + kStages * kTileBytes;
  static constexpr int kShares = kBehind + (kBoth && kCopiesBehind ? kTileBytes : 0);
  static constexpr int kBias = kShares + 2 * kTile * 16;
  static constexpr int kNorms = kBias + kBiases * kTile * 4;           // float [kTile]
  static constexpr int kMoved = kNorms + kTile * 4;                    // likewise: see Moved
  static constexpr int kBad = kMoved + (kIs16Bit<T> ? 0 : kTile * 4);  // int
  static constexpr int kPointers = kBad + 8;
  static constexpr int kBytes = kPointers + static_cast<int>(sizeof(NearFarPointers<T>));
  static_assert(kPointers % 8 == 0 && kBytes <= MaxSharedBytes(W, kWarps));
};

template <class T, int W, bool kBoth>
struct NearFarQueryGradientBlock
    : NearFarSteps<T, W, kBoth, NearFarQueryGradientLayout<T, W, kBoth>,
                   NearFarQueryGradientParams<T>> {
  using L = NearFarQueryGradientLayout<T, W, kBoth>;
  using Base = NearFarSteps<T, W, kBoth, L, NearFarQueryGradientParams<T>>;
  using Base::kChunks, Base::kStride;
  using Base::p, Base::shared, Base::tile, Base::floats, Base::pointers;
  using R = Ranged<T>;
  static constexpr int kColumns = kSlice<W> / 8;  // accumulators of a row of 16 queries
  // Columns of a step whose products are in registers at a time.
  static constexpr int kStep = kIs16Bit<T> && W == 64 ? 32 : 16;
  using Step = float[kStep / 8][4];

  // Sums of 16 queries over the columns so far.
  struct Sums {
    float px[kColumns][4], pz[kColumns][4];
    float sx[2], sz[2];                // this lane's shares
    float rounded_x[4], rounded_z[4];  // in 16 bits, of operands as rounded; the same in all lanes
    float far_x[2], far_z[2];          // those over features: of the rounded ones in 16 bits
    float centre[2];
    bool centred[2];

    PERFORMER_DEVICE void Init() {
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) px[n][i] = pz[n][i] = 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) rounded_x[i] = rounded_z[i] = 0.f;
#pragma unroll
      for (int e = 0; e < 2; ++e) sx[e] = sz[e] = far_x[e] = far_z[e] = centre[e] = 0.f;
      centred[0] = centred[1] = false;
    }

    // After the last feature: near logits have one more factor of root.
    PERFORMER_DEVICE void EndFar(float inverse_root) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) px[n][i] *= inverse_root, pz[n][i] *= inverse_root;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        far_x[e] = kIs16Bit<T> ? rounded_x[2 * e] : sx[e];
        far_z[e] = kIs16Bit<T> ? rounded_z[2 * e] : sz[e];
      }
    }
  };

  PERFORMER_DEVICE static int begin() { return SliceBegin<W>(blockIdx.z); }
  PERFORMER_DEVICE int* bad() const { return reinterpret_cast<int*>(shared + L::kBad); }

  // Whether the tile takes values as they are, and its origin [W].
  PERFORMER_DEVICE bool TakesRawValues() const {
    if constexpr (kIs16Bit<T>) return false;
    return pointers().block <= p.origins.first_block[OriginRow()];
  }
  PERFORMER_DEVICE const float* Origin() const { return p.origins.origin + OriginRow() * W; }
  PERFORMER_DEVICE int64_t OriginRow() const {
    return pointers().sequence * p.groups + blockIdx.y / (p.query.heads / p.groups);
  }

  // Of row `row` of the tile in [B L, H].
  PERFORMER_DEVICE int64_t Line(int row) const {
    return (pointers().row + row - pointers().begin) * p.query.heads + blockIdx.y;
  }

  // By one thread.
  PERFORMER_DEVICE void StorePointers() const {
    NearFarPointers<T>& to = pointers();
    to = MakeNearFarPointers<T, W>(p, blockIdx.x, blockIdx.y);
    if constexpr (!kIs16Bit<T>)
      if (to.begin < to.end && TakesRawValues())
        to.value = p.origins.values + (to.value - p.keys.value.data);
  }

  PERFORMER_DEVICE void IssueRows(int tid) const {
    const int begin = pointers().begin, end = pointers().end;
    const auto valid = [&](int r) { return r >= begin && r < end; };
    CopyRows<T, W, kTile, L::kThreads>(tile(L::kQuery), pointers().query, -begin, p.query, tid,
                                       valid);
    CopyRows<T, W, kTile, L::kThreads>(tile(L::kGradOut),
                                       p.grad_out.Row(pointers().row, blockIdx.y), -begin,
                                       p.grad_out, tid, valid);
  }

  // In units of root: half the squared norms of queries. And, where the tile takes values as they
  // are, what delta has more than with values less the origin. Each thread reads what it copied.
  PERFORMER_DEVICE void Norms(int tid) const {
    const float half = p.query_norm ? 0.5f * p.map.root : 0.f;
    VisitSquaredNorms<T, W, kTile, L::kThreads>(tile(L::kQuery), tid, [&](int row, float norm) {
      floats(L::kNorms)[row] = p.query_norm ? half * norm : 0.f;
    });
    if constexpr (!kIs16Bit<T>) {
      const bool raw = TakesRawValues();
      const int column = tid % kChunks * kChunk<T>;
#pragma unroll 1
      for (int row = tid / kChunks; row < kTile; row += kStride) {
        float moved = 0;
        if (raw)
          for (int i = 0; i < kChunk<T>; ++i)
            moved += ToFloat(tile(L::kGradOut)[At<T, W>(row, column) + i]) * Origin()[column + i];
#pragma unroll
        for (int lanes = 1; lanes < kChunks; lanes *= 2)
          moved += __shfl_xor_sync(kAllLanes, moved, lanes);
        if (tid % kChunks == 0) floats(L::kMoved)[row] = moved;
      }
    }
  }

  // Replaces the tile's own keys that are not finite by 0. Each thread reads what it copied itself.
  PERFORMER_DEVICE void ZeroNonFinite(T* keys, int tid) const {
    tid = Opaque(tid);
    const int column = tid % kChunks * kChunk<T>;
#pragma unroll 1
    for (int row = tid / kChunks; row < kTile; row += kStride) {
      T* const x = keys + At<T, W>(row, column);
      bool non_finite = false;
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) non_finite |= !IsFinite(x[i]);
      if (!non_finite) continue;
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) x[i] = FromFloat<T>(0.f);
      atomicMin(bad(), row);
    }
  }

  // y += the warp's rows of `rows` x kStep of `columns`.
  PERFORMER_DEVICE static void Product(Step& y, const T* rows, const T* columns, int row0,
                                       int lane) {
#pragma unroll(kUnroll<T>)
    for (int s = 0; s < W / 16; ++s) {
      uint32_t a[kFragment<T>];
      LoadA<T, W>(a, rows, row0, s * 16, lane);
#pragma unroll
      for (int n = 0; n < kStep / 16; ++n) {
        uint32_t b[kFragment<T>];
        LoadB<T, W>(b, columns, n * 16, s * 16, lane);
        Mma<T>(y[2 * n], y[2 * n + 1], a, b);
      }
    }
  }

  // What the logits of the warp's rows are relative to, in units of root: inf where a row has none,
  // or sees no key.
  PERFORMER_DEVICE void RowMax(float (&row_max)[2], int row0, int lane) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = row0 + lane / 4 + 8 * e;
      const bool given = row >= pointers().begin && row < pointers().end;
      const float lse = given ? p.log_weight[Line(row)] : -kInfinity;
      row_max[e] = lse == -kInfinity ? kInfinity : lse * p.map.inverse_root;
    }
  }

  // kStep columns of a step, from `first` on.
  PERFORMER_DEVICE void TakeColumns(Sums& sums, const float (&shift)[2], const T* columns,
                                    const T* values, const float* bias, float factor, bool is_own,
                                    int first, int row0, int lane) const {
    // Above the triangle. (In float32, where registers are short, the products are of zeros.)
    if (kIs16Bit<T> && is_own && first > row0 + 15) return;
    const int g = lane / 4, t = lane % 4;
    Step f = {}, x = {};
    Product(f, tile(L::kQuery), columns, row0, lane);
    const auto hidden = [&](int n, int i) {
      return is_own && first + n * 8 + 2 * t + (i & 1) > row0 + g + 8 * (i / 2);
    };
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float y = factor * f[n][i] + (bias[n * 8 + 2 * t + (i & 1)] - shift[i / 2]);
        f[n][i] = hidden(n, i) ? 0.f : Exp2(y * p.map.unit());
      }
    Product(x, tile(L::kGradOut), values, row0, lane);
    if (is_own)
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[n][i] = hidden(n, i) ? 0.f : x[n][i];
    if (__any_sync(kAllLanes, !sums.centred[0] || !sums.centred[1])) Centre(sums, f, x);
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[n][i] = f[n][i] == 0.f ? 0.f : f[n][i] * (x[n][i] - sums.centre[i / 2]);
        sums.sx[i / 2] += x[n][i];
        sums.sz[i / 2] += f[n][i];
      }
#pragma unroll
    for (int s = 0; s < kStep / 16; ++s) {
      uint32_t of_x[kFragment<R>], of_z[kFragment<R>];
      PackA<R>(of_x, x[2 * s], x[2 * s + 1]);
      PackA<R>(of_z, f[2 * s], f[2 * s + 1]);
      if constexpr (kIs16Bit<R>) {
        const uint32_t ones = Pack<R>(1.f, 1.f);
        MmaM16N8K16<R>(sums.rounded_x, of_x, ones, ones);
        MmaM16N8K16<R>(sums.rounded_z, of_z, ones, ones);
      }
#pragma unroll
      for (int n = 0; n < kColumns / 2; ++n) {
        uint32_t b[kFragment<T>];
        LoadBTrans<T, W>(b, columns, s * 16, begin() + n * 16, lane);
        MakeRangedOperand<T>(b);
        Mma<R>(sums.px[2 * n], sums.px[2 * n + 1], of_x, b);
        Mma<R>(sums.pz[2 * n], sums.pz[2 * n + 1], of_z, b);
      }
    }
  }

  // Divides, and stores the gradient and the statistics of the warp's rows.
  PERFORMER_DEVICE void Write(const Sums& sums, const float (&row_max)[2], int row0,
                              int lane) const {
    const int g = lane / 4, t = lane % 4;
    const float scale = p.map.root * p.map.root;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float sz = QuadSum(sums.sz[e]), sx = QuadSum(sums.sx[e]);
      float far_x = sums.far_x[e], far_z = sums.far_z[e];
      if constexpr (!kIs16Bit<T>) far_x = QuadSum(far_x), far_z = QuadSum(far_z);
      const int row = row0 + g + 8 * e;
      if (row < pointers().begin || row >= pointers().end) continue;
      const int64_t line = Line(row);
      const bool any = sz != 0.f, is_bad = row >= *bad();
      const float given = any ? p.grad_log_weight[line] : 0.f;
      float rest = any ? sx / sz - given : 0.f;
      if (begin() == 0 && t == 0) {
        const float log_sum = any ? log2f(sz) : 0.f;
        float log_max = row_max[e], delta = any ? sums.centre[e] + rest : 0.f;
        if constexpr (kKeepsLogSum<T>) {
          p.statistics.log_sum[line] = log_sum;
          if (any) delta -= floats(L::kMoved)[row];
        } else {
          log_max += log_sum / p.map.unit();
        }
        if (is_bad) delta = NAN;
        p.statistics.near_max[line] = any ? log_max : -kInfinity;
        p.statistics.far_max[line] = any ? log_max + floats(L::kNorms)[row] : -kInfinity;
        p.statistics.delta[line] = delta;
      }
      float factor = any ? scale / sz : 0.f;
      if constexpr (kIs16Bit<T>)
        if (any) {
          rest = sums.rounded_x[2 * e] / sums.rounded_z[2 * e] - given;
          factor = scale / sums.rounded_z[2 * e];
        }
      if (is_bad) factor = NAN;
      const float norm = p.query_norm ? far_x - rest * far_z : 0.f;
      T* const to = p.grad_query.Row(pointers().row + row - pointers().begin, blockIdx.y);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const int column = begin() / 8 + n;
        const float2 q = LoadPair(tile(L::kQuery) + AtPair<T, W>(row, column, t));
        const auto value = [&](int c) {
          const int i = 2 * e + c;
          const float y = sums.px[n][i] - rest * sums.pz[n][i] - norm * (c == 0 ? q.x : q.y);
          return any || is_bad ? y * factor : 0.f;
        };
        StoreColumns(to, column * 8 + 2 * t, p.grad_query.width, p.grad_query.aligned, value(0),
                     value(1));
      }
    }
  }

 private:
  PERFORMER_DEVICE static void Centre(Sums& sums, const Step& f, const Step& x) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sx = 0, sz = 0;
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float weight = f[n][2 * e + c];
          sx += weight == 0.f ? 0.f : weight * x[n][2 * e + c];
          sz += weight;
        }
      sx = QuadSum(sx), sz = QuadSum(sz);
      if (!sums.centred[e] && sz > 0.f) sums.centre[e] = sx / sz, sums.centred[e] = true;
    }
  }
};

template <class T, int W, bool kBoth>
__global__ void __launch_bounds__(128, 2)
    NearFarQueryGradientKernel(NearFarQueryGradientParams<T> p) {
  using Block = NearFarQueryGradientBlock<T, W, kBoth>;
  using L = NearFarQueryGradientLayout<T, W, kBoth>;
  PERFORMER_SHARED_MEMORY(shared);
  const int tid = threadIdx.x;
  // From a shuffle, so that branches on it are known to be the same for the whole warp.
  const int warp = __shfl_sync(kAllLanes, tid / 32, 0), lane = tid % 32, row0 = warp * 16;
  const Block block = {{p, shared}};
  if (tid == 0) {
    block.StorePointers();
    *block.bad() = INT32_MAX;
  }
  __syncthreads();  // the pointers are visible
  if (block.pointers().begin == block.pointers().end) return;

  block.IssueRows(tid);
  typename Block::Base::Column column;
  block.Load(column, 0, tid);
  block.Store(column, 0, tid);
  block.Load(column, 1, tid);
  if constexpr (L::kStages == 2) {
    __syncthreads();  // the shares are visible
    block.Issue(0, tid);
  }
  float row_max[2];
  block.RowMax(row_max, row0, lane);
  typename Block::Sums sums;
  sums.Init();
  const int far = block.far_steps(), steps = block.steps();
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    T* const columns = block.tile(L::kColumns + block.buffer(step));
    T* const values = block.tile(L::kValues + block.buffer(step));
    if constexpr (L::kStages == 1) {
      __syncthreads();  // nobody reads the tiles any more; shares and masks are visible
      block.Issue(step, tid);
    }
    CpAsyncWait<0>();
    const bool is_far = step < far, is_own = block.IsOwn(step);
    if (step == 0) block.Norms(tid);
    if (is_far) block.MergeFar(step, tid);
    if (is_own) block.ZeroNonFinite(columns, tid);
    block.Store(column, step + 1, tid);
    __syncthreads();  // the tiles of the step are complete; the other buffer is free
    if (L::kStages == 2 && step + 1 < steps) block.Issue(step + 1, tid);
    block.Load(column, step + 2, tid);

    const int g = lane / 4;
    float shift[2];
#pragma unroll
    for (int e = 0; e < 2; ++e)
      shift[e] = row_max[e] + (is_far ? block.floats(L::kNorms)[row0 + g + 8 * e] : 0.f);
    if (step == far) sums.EndFar(p.map.inverse_root);
#pragma unroll 1
    for (int first = 0; first < kTile; first += Block::kStep)
      block.TakeColumns(sums, shift, columns + first * W, values + first * W,
                        block.bias(step) + first, is_far ? 1.f : p.map.root, is_own, first, row0,
                        Opaque(lane));
  }
  if (steps == far) sums.EndFar(p.map.inverse_root);  // no near key
  block.Write(sums, row_max, row0, lane);
}

}  // namespace cuda
}  // namespace performer
