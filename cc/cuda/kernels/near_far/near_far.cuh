// Near-and-far attention, in tiles of up to kTile query rows of one block of positions:
//
//   out = softmax(near logits, log-features + log_mass of far keys) (values; mean of far keys)
//
// Near keys are further keys of one softmax, whose other keys are the features. Grid: (tiles of all
// blocks, query heads). A block takes the steps of near_far/steps.cuh with online softmax
// (device/online_softmax.cuh).
//
// Nothing of a later row may change a bit of an earlier one, whatever it holds. The state has whole
// blocks of earlier rows. The tile's own keys come last, in a tile of their own: the causal mask
// selects their logits, and a value that is not finite is replaced by 0 and remembered as
// poison[e], the first row from which column e is NaN.
#pragma once
#include "cuda/device/online_softmax.cuh"
#include "cuda/device/poison.cuh"
#include "cuda/kernels/near_far/steps.cuh"

namespace performer {
namespace cuda {

template <class T>
struct NearFarParams : NearFarStepsParams<T> {
  RowsOf<T> out;  // [B L, H, E]
  float* log_weight = nullptr;
};

template <class T, int W, bool kBoth>
struct NearFarLayout {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static_assert(kTile == 16 * kWarps && kTile == kFeatureUnit, "a warp has 16 queries");
  // Of 64 features or keys: the next ones are copied while one is worked on. One where two would
  // not fit.
  static constexpr int kStages = kIs16Bit<T> && W <= 128 ? 2 : 1;
  static constexpr bool kCopiesBehind = true;
  static constexpr bool kInRegisters = kIs16Bit<T> && W == 64;  // operands of queries
  static constexpr int kBiases = 4;                             // that of a step, and later ones

  // Shared memory, in bytes.
  static constexpr int kTileBytes = kTile * W * static_cast<int>(sizeof(T));
  static constexpr int kQuery = 0;
  static constexpr int kColumns = kTileBytes;  // [kStages]: rows of the projection; near keys
  static constexpr int kValues = kColumns + kStages * kTileBytes;     // [kStages]: means; values
  static constexpr int kBehind = kValues + kStages * kTileBytes;      // means behind the next block
  static constexpr int kShares = kBehind + (kBoth ? kTileBytes : 0);  // float4 [2][kTile]
  static constexpr int kBias = kShares + 2 * kTile * 16;              // float [kBiases][kTile]
  static constexpr int kNorms = kBias + kBiases * kTile * 4;          // float [kTile]
  static constexpr int kPoison = kNorms + kTile * 4;                  // int [W]
  static constexpr int kPointers = kPoison + W * 4;
  static constexpr int kBytes = kPointers + static_cast<int>(sizeof(NearFarPointers<T>));
  static_assert(kPointers % 8 == 0 && kBytes <= MaxSharedBytes(W, kWarps));
};

template <class T, int W, bool kBoth>
struct NearFarBlock : NearFarSteps<T, W, kBoth, NearFarLayout<T, W, kBoth>, NearFarParams<T>> {
  using Base = NearFarSteps<T, W, kBoth, NearFarLayout<T, W, kBoth>, NearFarParams<T>>;
  using L = NearFarLayout<T, W, kBoth>;
  using Base::p, Base::shared, Base::pointers;
  using typename Base::Pointers;

  PERFORMER_DEVICE int* poison() const { return reinterpret_cast<int*>(shared + L::kPoison); }

  // Divides by the sums of rows and writes the rows that are queries.
  PERFORMER_DEVICE void Write(const Softmax<T, W, 1>& softmax, int row0, int lane) const {
    const int g = lane / 4, t = lane % 4;
    const Pointers& to = pointers();
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum;
      const float inverse = softmax.Inverse(0, e, &sum);
      const int row = row0 + g + 8 * e;
      if (row < to.begin || row >= to.end) continue;
      if (t == 0)
        p.log_weight[(to.row + row - to.begin) * p.query.heads + blockIdx.y] =
            inverse == 0.f ? -kInfinity : softmax.row_max[0][e] * p.map.root + logf(sum);
      T* const out = p.out.Row(to.row + row - to.begin, blockIdx.y);
#pragma unroll
      for (int n = 0; n < W / 8; ++n) {
        const int column = n * 8 + 2 * t;
        const auto value = [&](int c) {
          return poison()[column + c] <= row ? NAN
                 : inverse == 0.f            ? 0.f
                                             : softmax.acc[0][n][2 * e + c] * inverse;
        };
        StoreColumns(out, column, p.out.width, p.out.aligned, value(0), value(1));
      }
    }
  }
};

template <class T, int W, bool kBoth>
__global__ void __launch_bounds__(128, 2) NearFarKernel(NearFarParams<T> p) {
  using Block = NearFarBlock<T, W, kBoth>;
  using L = NearFarLayout<T, W, kBoth>;
  PERFORMER_SHARED_MEMORY(shared);
  const int tid = threadIdx.x;
  // From a shuffle, so that branches on it are known to be the same for the whole warp.
  const int warp = __shfl_sync(kAllLanes, tid / 32, 0), lane = tid % 32, row0 = warp * 16;
  const Block block = {{p, shared}};
  if (tid == 0) block.pointers() = MakeNearFarPointers<T, W>(p, blockIdx.x, blockIdx.y);
  for (int column = tid; column < W; column += L::kThreads) block.poison()[column] = INT32_MAX;
  __syncthreads();  // the pointers are visible
  if (block.pointers().begin == block.pointers().end) return;

  T* const queries = block.tile(L::kQuery);
  {
    const int begin = block.pointers().begin, end = block.pointers().end;
    CopyRows<T, W, kTile, L::kThreads>(queries, block.pointers().query, -begin, p.query, tid,
                                       [&](int r) { return r >= begin && r < end; });
  }
  typename Block::Column column;
  block.Load(column, 0, tid);
  block.Store(column, 0, tid);
  block.Load(column, 1, tid);
  if constexpr (L::kStages == 2) {
    __syncthreads();  // the shares are visible
    block.Issue(0, tid);
  }
  uint32_t q[1][W / 16][kFragment<T>];
  const auto rows = [&](uint32_t (&a)[kFragment<T>], int m, int s) {
    LoadRowOperand<L::kInRegisters, T, W>(a, q, queries, row0, m, s, lane);
  };
  Softmax<T, W, 1> softmax;
  softmax.Init();
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
    if (step == 0) {
      const float half = p.query_norm ? 0.5f * p.map.root : 0.f;
      VisitSquaredNorms<T, W, kTile, L::kThreads>(queries, tid, [&](int row, float norm) {
        block.floats(L::kNorms)[row] = p.query_norm ? half * norm : 0.f;
      });
    }
    if (step < far) block.MergeFar(step, tid);
    if (block.IsOwn(step)) ZeroNonFinite<T, W, L::kThreads>(values, block.poison(), tid);
    block.Store(column, step + 1, tid);
    __syncthreads();  // the tiles of the step are complete; the other buffer is free
    if (L::kStages == 2 && step + 1 < steps) block.Issue(step + 1, tid);
    block.Load(column, step + 2, tid);
    if constexpr (L::kInRegisters) {
      if (step == 0)
#pragma unroll
        for (int s = 0; s < W / 16; ++s) LoadA<T, W>(q[0][s], queries, row0, s * 16, lane);
    }

    const int at = Opaque(lane), g = at / 4, t = at % 4;
    float x[1][8][4] = {};
    softmax.AddProducts(rows, columns, at, x);
    const bool is_far = step < far;
    const float factor = is_far ? 1.f : p.map.root;
    const float* const bias = block.bias(step);
    const float shift[2] = {is_far ? block.floats(L::kNorms)[row0 + g] : 0.f,
                            is_far ? block.floats(L::kNorms)[row0 + g + 8] : 0.f};
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[0][n][i] = factor * x[0][n][i] + (bias[n * 8 + 2 * t + (i & 1)] - shift[i / 2]);
    if (block.IsOwn(step))
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (n * 8 + 2 * t + (i & 1) > row0 + g + 8 * (i / 2)) x[0][n][i] = -kInfinity;
    softmax.Accumulate(x, values, p.map.unit(), at);
  }
  block.Write(softmax, row0, lane);
}

}  // namespace cuda
}  // namespace performer
