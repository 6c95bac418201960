// Gradient of near-and-far attention with respect to the projection of keys, only where it is asked
// for. A block has 64 features of a split of positions, and walks its tiles of keys, with kb and db
// as in near_far_backward/key_gradients.cuh:
//
//   dw += root db k
//
// A warp has 16 features. These are partial results of a split and head, for
// backward/sum_partials.cuh.
//
// A warp has 16 features, and a slice of the columns of dw.
//
// Grid: (splits of all sequences, key/value heads, feature blocks).
#pragma once
#include "cuda/kernels/near_far_backward/key_gradients.cuh"

namespace performer {
namespace cuda {

template <class T>
struct NearFarKeyProjectionParams : NearFarKeyGradientsParams<T> {
  float* part_projection = nullptr;  // [splits, G, M, D]
};

// In the shared memory of NearFarKeyLayout, of one stage.
template <class T, int W, bool kBoth>
struct NearFarKeyProjectionBlock : NearFarKeyBlock<T, W, kBoth> {
  using Base = NearFarKeyBlock<T, W, kBoth>;
  using L = typename Base::L;
  using R = Ranged<T>;
  using Base::p, Base::tile, Base::columns, Base::reverse, Base::numbers;
  static constexpr int kKeys = W * sizeof(T) <= 256 ? 32 : 16;  // of a tile, at a time
  using Tile = BackwardTile<1, kKeys>;

  // x += R v^T: see ReverseProduct.
  PERFORMER_DEVICE void ReverseProduct(Tile& x, int step, int j0, int row0, int lane) const {
#pragma unroll(kUnroll<T>)
    for (int s = 0; s < W / 16; ++s)
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t value[kFragment<T>], b[kFragment<R>];
        LoadB<T, W>(value, tile(L::kValue), j0 + n * 16, s * 16, lane);
#pragma unroll
        for (int i = 0; i < kFragment<T>; ++i) b[i] = value[i];
        MakeRangedOperand<T>(b);
#pragma unroll
        for (int part = L::kParts - 1; part >= 0; --part) {  // the small one first
          uint32_t a[kFragment<R>];
          LoadA<R, W>(a, reverse(step, part), row0, s * 16, lane);
          if constexpr (kHasRanged<T>)
            if (part == 0) {
              uint32_t rest[kFragment<R>];
              RangedRest<T>(rest, value, b);
              Mma<R>(x[0][2 * n], x[0][2 * n + 1], a, rest);
            }
          Mma<R>(x[0][2 * n], x[0][2 * n + 1], a, b);
        }
      }
  }

  // kKeys of the tile, from j0 on. bias: of keys.
  PERFORMER_DEVICE void TakeKeys(float (&sum)[1][kSlice<W> / 8][4], const float* bias, int step,
                                 int j0, int row0, int c0, int lane) const {
    const int g = lane / 4, t = lane % 4;
    const float2 of_row[2] = {numbers(step)[row0 + g], numbers(step)[row0 + g + 8]};
    Tile x = {}, y;
    FeatureProduct<T, W, 1, kKeys>(x, columns(step), row0, tile(L::kKey), j0, lane);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float b = bias[j0 + n * 8 + 2 * t + (i & 1)];
        x[0][n][i] = Exp2((x[0][n][i] + (b - of_row[i / 2].x)) * p.map.unit());
        y[0][n][i] = -of_row[i / 2].y;
      }
    ReverseProduct(y, step, j0, row0, lane);
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) y[0][n][i] = x[0][n][i] == 0.f ? 0.f : x[0][n][i] * y[0][n][i];
    SumRangedTokens<T, W, kKeys>(sum, y, tile(L::kKey), j0, c0, lane);
  }
};

template <class T, int W, bool kBoth>
__global__ void __launch_bounds__(128, W == 64 ? 2 : 1)
    NearFarKeyProjectionKernel(NearFarKeyProjectionParams<T> p) {
  using Block = NearFarKeyProjectionBlock<T, W, kBoth>;
  using L = typename Block::L;
  PERFORMER_SHARED_MEMORY(shared);
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  constexpr int kFeatureWarps = L::kFeatures / 16;
  static_assert(L::kWarps == kFeatureWarps * kSlices<W>);
  const int row0 = warp % kFeatureWarps * 16, c0 = warp / kFeatureWarps * kSlice<W>;
  const Block block = {{p, shared}};
  const WorkTile split = GetWorkTile(p.geometry.splits, blockIdx.x);
  const int64_t window = p.geometry.window, tiles = CeilDiv(window, kTile);
  const int64_t first_block = FirstWorkTile(p.geometry.blocks, split.sequence);
  const int64_t first = (first_block + split.begin / window) * tiles;
  const int64_t end = (first_block + CeilDiv(split.end, window)) * tiles;
  const int step = static_cast<int>(blockIdx.z), all = step + 1;
  float sum[1][kSlice<W> / 8][4] = {};

#pragma unroll 1
  for (int64_t number = first; number < end; ++number) {
    NearFarSequence sequence;
    int64_t of_sequence;
    const WorkTile work = GetKeyTile(p.geometry, number, &sequence, &of_sequence);
    if (work.begin == work.end) continue;
    __syncthreads();  // nobody reads the last tile any more
    if (tid == 0)     // visible at the barrier of the stream
      block.pointers() = MakeNearFarKeyPointers<T, W>(p, work, sequence, of_sequence,
                                                      first_block + of_sequence, blockIdx.y);
    KeyStream<T, W, L::kThreads> stream(p.keys, p.map, work, blockIdx.y, shared + L::kStream, tid);
    if (block.far_steps() == 0) continue;
    stream.LoadKeyBias(0, tid);
    stream.StoreKeyBias(0, tid);
    typename Block::Base::Column column = {};
    block.Load(column, step, all, tid);
    block.Store(column, step, all, tid);
    __syncthreads();  // the mask of the keys, and factors, are visible
    stream.Issue(0, 0, block.tile(L::kKey), block.tile(L::kValue), tid);
    block.IssueFeatures(step, tid);
    CpAsyncWait<0>();
    stream.ComputeBias(0, block.tile(L::kKey), tid);
    block.MergeReverse(step, tid);
    __syncthreads();  // the tile and R are complete
#pragma unroll 1
    for (int j0 = 0; j0 < stream.pointers->rows; j0 += Block::kKeys)
      block.TakeKeys(sum, stream.bias, step, j0, row0, c0, Opaque(lane));
  }
  const int width = p.keys.key.width;
  StoreSums(p.part_projection +
                (static_cast<int64_t>(blockIdx.x) * p.groups + blockIdx.y) * p.features * width,
            width, static_cast<int>(p.features), step * L::kFeatures + row0, sum, p.map.root, c0,
            lane);
}

}  // namespace cuda
}  // namespace performer
