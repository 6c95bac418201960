// Gradient of causal attention with respect to keys and values, in tiles of kTile rows side by
// side.
// (R, r) is the reverse state after the tile (causal_backward/reverse_states.cuh), and `reference`
// the log_mass that it is relative to:
//
//   kb = exp(b - reference) <= 1        f = exp(a + reference - lse)
//   db = kb (v R^T - r + tril(dA)^T f)
//   dk = root (db slope) w - scale k sum_m db        dbias = sum_m db
//   dv = kb R + tril(f kb^T)^T grad_out
//
// Grid: (tiles of all sequences, key/value heads, slices). A block walks the features in blocks of
// 32. A warp owns 16 keys, whose gradients stay in registers, and in the products with queries 16
// features and 32 queries. f, dA and what is made of them are computed for each query head of the
// key/value head in turn; the first one takes R and r of the checkpoint, which are those of all.
//
// f is large where keys of the tile outweigh all before them by far. Where a feature block has an f
// beyond kCausalCutBits, its pairs are taken one by one (TakePairs), which costs as many
// exponentials as there are pairs and features. That is rare. Masked keys get exactly 0.
#pragma once
#include "cuda/kernels/causal_backward/key_gradients.cuh"

namespace performer {
namespace cuda {

template <class T, int W>
struct CausalDkvLayout : CausalKeyLayout<T, W> {
  using S = CausalKeyLayout<T, W>;
  // dk of wide keys is kept in shared memory if there is room for it: registers are short.
  static constexpr bool kKeeps = kIs16Bit<T> && W == 128;
  using Kept = KeptSums<kSlice<W>, S::kThreads, kKeeps>;
  static constexpr int kKept = (S::kBytes + 15) / 16 * 16;
  static constexpr int kBytes = kKeeps ? kKept + Kept::kBytes : S::kBytes;
  static_assert(kBytes <= MaxSharedBytes(W, S::kWarps));
};

// The gradients of a warp's 16 keys.
template <class T, int W>
struct CausalDkvSums {
  using Block = CausalKeyGradients<T, W>;
  using L = CausalDkvLayout<T, W>;
  using R = typename Block::R;

  typename L::Kept key;
  float value[kSlice<W> / 8][4] = {};
  float total[2] = {};  // this lane's share of the sum of db over features

  PERFORMER_DEVICE CausalDkvSums(unsigned char* shared, int tid) : key(shared + L::kKept, tid) {}

  // Those of a feature block.
  PERFORMER_DEVICE void TakeFeatures(const Block& block, typename Block::Features& db,
                                     const typename Block::KeyOperand& kb,
                                     typename Block::Pairs& local, bool with_state, bool pairs,
                                     int stage, int row0, int lane) {
    typename Block::KeyOperand a;
    const auto pack = [&] {
#pragma unroll
      for (int s = 0; s < Block::kFeatures / 16; ++s) PackA<R>(a[s], db[2 * s], db[2 * s + 1]);
    };
    pack();
    // Of the operand as it is rounded: the errors cancel in dk.
#pragma unroll
    for (int s = 0; s < Block::kFeatures / 16; ++s)
#pragma unroll
      for (int e = 0; e < 2; ++e) total[e] += OperandSum<R>(a[s], e);
    if (!block.p.map.linear()) {
      block.TakeSlopes(db, stage, row0, lane);
      pack();
    }
    constexpr int kProjectionColumns = Block::kProjectionColumns;
    key.template Add<R, kProjectionColumns>(a, block.ranged_projection(stage),
                                            kProjectionColumns == W ? Block::begin() : 0, lane);
#pragma unroll
    for (int s = 0; s < Block::kFeatures / 16; ++s) {
      uint32_t b[kFragment<R>];
      if (with_state)
#pragma unroll
        for (int n = 0; n < kSlice<W> / 16; ++n) {
          LoadBTrans<R, kSlice<W>>(b, block.ranged_reverse(stage), s * 16, n * 16, lane);
          Mma<R>(value[2 * n], value[2 * n + 1], kb[s], b);
        }
      if (pairs)
#pragma unroll
        for (int n = 0; n < kTile / 16; ++n) {
          if (n * 16 < row0) continue;  // above the triangle
          LoadBTrans<R, kTile>(b, block.ranged(L::kQueryFeatures), s * 16, n * 16, lane);
          Mma<R>(local[2 * n], local[2 * n + 1], kb[s], b);
        }
    }
  }

  // dv += tril(local) grad_out.
  PERFORMER_DEVICE void TakePairs(const Block& block, typename Block::Pairs& local, int row0,
                                  int lane) {
#pragma unroll
    for (int n = 0; n < Block::kQueryTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (row0 + lane / 4 + i / 2 * 8 > n * 8 + 2 * (lane % 4) + (i & 1)) local[n][i] = 0.f;
#pragma unroll
    for (int s = 0; s < kTile / 16; ++s) {
      if (s * 16 < row0) continue;  // above the triangle
      uint32_t a[kFragment<R>];
      PackA<R>(a, local[2 * s], local[2 * s + 1]);
#pragma unroll
      for (int n = 0; n < kSlice<W> / 16; ++n) {
        uint32_t b[kFragment<R>];
        LoadBTrans<R, W>(b, block.ranged(L::kGradOut), s * 16, Block::begin() + n * 16, lane);
        Mma<R>(value[2 * n], value[2 * n + 1], a, b);
      }
    }
  }

  // key_bias: of the tile's keys, as given.
  PERFORMER_DEVICE void Write(const Block& block, const float* key_bias, int row0, int rows,
                              int lane) {
    const CausalDkvParams<T>& p = block.p;
    const CausalDkvPointers<T>& to = *block.pointers();
    float dk[kSlice<W> / 8][4];
    key.Read(dk);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float all = QuadSum(total[e]);
      const int row = row0 + lane / 4 + 8 * e;
      if (row >= rows) continue;
      const bool masked = key_bias[row] == -kInfinity;
      const float norm = p.map.root * p.map.root * all;
      if (to.grad_bias != nullptr && Block::begin() == 0 && lane % 4 == 0)
        to.grad_bias[row] = masked ? 0.f : all;
      T* const key_row = to.grad_key + static_cast<int64_t>(row) * p.grad_key.stride;
      T* const value_row = to.grad_value + static_cast<int64_t>(row) * p.grad_value.stride;
#pragma unroll
      for (int n = 0; n < kSlice<W> / 8; ++n) {
        const int column = Block::begin() + n * 8 + 2 * (lane % 4);
        float2 x = {dk[n][2 * e] * p.map.root, dk[n][2 * e + 1] * p.map.root};
        float2 y = {value[n][2 * e], value[n][2 * e + 1]};
        if (p.map.key_norm) {
          const float2 k = LoadPair(block.tile(L::kKey) + AtPair<T, W>(row, column / 8, lane % 4));
          x.x -= norm * k.x, x.y -= norm * k.y;
        }
        if (masked) x = y = float2{0.f, 0.f};
        StoreColumns(key_row, column, p.grad_key.width, p.grad_key.aligned, x.x, x.y);
        StoreColumns(value_row, column, p.grad_value.width, p.grad_value.aligned, y.x, y.y);
      }
    }
  }
};

template <class T, int W>
__global__ void __launch_bounds__(128, W == 64 ? 2 : 1) CausalDkvKernel(CausalDkvParams<T> p) {
  using Block = CausalKeyGradients<T, W>;
  using L = CausalDkvLayout<T, W>;
  PERFORMER_SHARED_MEMORY(shared);
  const int tid = threadIdx.x;
  // From a shuffle, so that branches on it are known to be the same for the whole warp.
  const int warp = __shfl_sync(kAllLanes, tid / 32, 0), lane = tid % 32, row0 = warp * 16;
  const Block block = {{{p, shared, static_cast<int64_t>(blockIdx.y)}}};
  int* const any_steep = reinterpret_cast<int*>(shared + L::kSteep);
  // Where registers allow, addresses are kept from one product to the next.
  const auto fresh = [&] { return kIs16Bit<T> && W == 64 ? lane : Opaque(lane); };
  const WorkTile work = GetWorkTile(p.work, blockIdx.x);
  if (tid == 0)
    *const_cast<CausalDkvPointers<T>*>(block.pointers()) =
        MakeCausalDkvPointers<T, W>(p, work, blockIdx.x, blockIdx.y);
  typename L::Stream stream(p.keys, p.map, work, blockIdx.y, shared + L::kStream, tid);
  IssueKeys(block, stream, tid);
  const int rows = stream.pointers->rows, features = static_cast<int>(p.features);
  const int each = block.each();
  CausalDkvSums<T, W> sums(shared, tid);

#pragma unroll 1
  for (int head = 0; head < each; ++head) {
    const bool advances = block.advances(), with_rest = head == 0;
    const bool with_state = with_rest || advances;
    if (head > 0) __syncthreads();  // nobody reads the last queries any more
    block.IssueQueries(head, rows, tid);
    if constexpr (L::kStages == 2) block.IssueFeatures(0, 0, tid);
    CpAsyncWait<0>();
    if (head == 0) {
      stream.ComputeBias(0, block.tile(L::kKey), tid);
      block.FinishKeys(tid);
    }
    block.FinishGradOut(tid);
    __syncthreads();  // keys, values and queries are complete
    block.StorePairGradients(row0, lane);
    if constexpr (L::kAdvances)
      if (advances) {
        __syncthreads();  // nobody reads grad_out any more
        block.IssueNext(head, tid);
      }
    typename Block::Pairs local = {};

#pragma unroll 1
    for (int first = 0; first < features; first += L::kFeatures) {
      const int stage = L::kStages == 2 ? first / L::kFeatures & 1 : 0;
      if constexpr (L::kStages == 1) {
        __syncthreads();  // nobody reads the last feature block any more, or grad_out in its place
        block.IssueFeatures(first, 0, tid);
      }
      CpAsyncWait<0>();
      if constexpr (L::kAdvances)
        if (advances && first == 0) block.FinishNext(warp, tid);
      __syncthreads();  // the feature block is complete; the other one and f are free
      if (L::kStages == 2 && first + L::kFeatures < features)
        block.IssueFeatures(first + L::kFeatures, stage ^ 1, tid);
      MakeRanged<T, W, L::kFeatures, L::kThreads, Block::kProjectionColumns>(
          block.ranged_projection(stage), block.projection(stage), tid, Block::begin());
      {
        typename Block::After after;
        // Loads are in flight during products, where there are registers for it.
        const bool adds = with_rest && !advances;
        if (W == 64 && adds) block.LoadAfter(after, first, tid);
        const bool steep = block.StoreQueryFeatures(first, stage, head, warp, fresh());
        if (W > 64 && adds) block.LoadAfter(after, first, tid);
        if (adds) block.AddAfter(after, stage, tid);
        const int any = __any_sync(kAllLanes, steep);
        if (lane == 0) any_steep[warp] = any;
      }
      if constexpr (L::kAdvances)
        if (advances) {
          __syncthreads();  // f of the next tile is visible
          block.Advance(first, with_rest, stage, warp, fresh());
        }
      __syncthreads();  // f, R and r are visible
      const bool steep = __any_sync(kAllLanes, any_steep[lane % L::kWarps]) != 0;
      typename Block::Features db;
      typename Block::KeyOperand kb;
      block.WeightGradients(db, with_state, !steep, stage, row0, fresh());
      block.TakeKeyWeights(db, kb, stream.bias, stage, row0, fresh());
      if (steep) {
        block.StoreQueryLogWeights(first, head, warp, fresh());
        __syncthreads();  // log-weights are visible
        block.TakePairs(db, local, stream.bias, stage, row0, fresh());
      }
      sums.TakeFeatures(block, db, kb, local, with_state, !steep, stage, row0, fresh());
    }
    if (L::kSharesGradOut || advances) {
      __syncthreads();  // nobody reads the last feature block or the next grad_out any more
      block.IssueGradOut(head, rows, tid);
      CpAsyncWait<0>();
      block.FinishGradOut(tid);
      __syncthreads();  // grad_out is complete
    }
    sums.TakePairs(block, local, row0, fresh());
  }
  sums.Write(block, stream.key_bias, row0, rows, fresh());
}

}  // namespace cuda
}  // namespace performer
