// Gradient of causal attention, forward sweep: with the state (sum, mass) before the sub-chunk,
//   da = f (sum . grad_out - delta mass + kb tril(dA)^T)
//   over tokens      dw = root (da slope) q      dfeature_bias = da 1      state += kb v
//   over features   dq = root (da slope)^T w
//
// Grid: (splits of all sequences, query heads). Sums over tokens are partial results of a
// split and head, for backward/sum_partials.cuh.
#pragma once
#include "cuda/kernels/causal_backward/common.cuh"

namespace performer {
namespace cuda {

template <class T>
struct CausalDqParams : CausalGradientParams<T> {
  Projection<T> projection;                // of queries
  const uint32_t* key_operands = nullptr;  // projections of keys, see PackOperandsKernel
  int64_t key_head_step = 0;               // rows between heads' operands: features_pad or 0
  float* corrected_delta = nullptr;        // [B L, H], of CausalDeltaKernel
  RowsOf<T> grad_query;                    // [B L, H, D]
  float* sum_query = nullptr;  // [B L, H, W], if a block cannot hold all features, else nullptr
  float* chunk_log_mass = nullptr;     // [chunks, G, M] in natural logarithms, see ChunkSlot
  float* part_feature_bias = nullptr;  // [splits, H, M]
  float* part_projection = nullptr;    // [splits, H, M, D]
};

// Where a block works; in shared memory, as KeyPlace.
template <class T>
struct CausalQueryPlace {
  const T *query, *grad_out;  // the split's first row
  const float *lse, *delta;   // likewise
  T* grad_query;
  float *sum_query, *corrected_delta;
  float* chunk_log_mass;         // of the split's first chunk; nullptr: another block keeps it
  const T* projection;           // of the first feature
  const uint32_t* key_operands;  // likewise
  const float* feature_bias;     // likewise
  const float *log_mass, *mean;  // state before, likewise
};

template <class T, int W, int kWarps>
struct CausalDqLayout : CausalBackwardLayout<T, W, kWarps> {
  using S = CausalBackwardLayout<T, W, kWarps>;
  static constexpr int kRangedProjection = kHasRanged<T> ? S::kFeatureBytes : 0;
  static constexpr int kQuery = kRangedProjection + S::kFeatureBytes;
  static constexpr int kRangedQuery = kQuery + (kHasRanged<T> ? S::kTileBytes : 0);
  static constexpr int kKey = kRangedQuery + S::kTileBytes;
  static constexpr int kValue = kKey + S::kTileBytes;
  static constexpr int kGradOut = kValue + S::kTileBytes;
  static constexpr int kSummed = kGradOut + S::kTileBytes;  // da
  static constexpr int kPairs = kSummed + S::kSummedBytes;  // dA
  static constexpr int kPairRest = kPairs + S::kPairBytes;  // what rounding took from dA
  static constexpr int kLse = kPairRest + (kIs16Bit<T> ? S::kPairBytes : 0);  // float [kRows]
  static constexpr int kDelta = kLse + S::kRows * 4;                          // likewise
  static constexpr int kStream = kDelta + S::kRows * 4;
  static constexpr int kPlace = kStream + KeyStream<T, W, S::kThreads, S::kRows>::kSharedBytes;
  static constexpr int kBytes = kPlace + static_cast<int>(sizeof(CausalQueryPlace<T>));
  static_assert(kStream % 8 == 0 && kPlace % 8 == 0 && kBytes <= S::kMostBytes);
};

// kDelta: CausalDeltaKernel.
template <class T, int W, int kWarps, bool kDelta>
PERFORMER_DEVICE void CausalDq(const CausalDqParams<T>& p) {
  using L = CausalDqLayout<T, W, kWarps>;
  using R = Ranged<T>;
  using Warp = WarpFeatures<T, W>;
  constexpr int C = L::kRows, kThreads = L::kThreads, kStep = 32;  // queries at a time
  PERFORMER_SHARED_MEMORY(shared);
  T* const projection = reinterpret_cast<T*>(shared);
  R* const ranged_projection = reinterpret_cast<R*>(shared + L::kRangedProjection);
  T* const queries = reinterpret_cast<T*>(shared + L::kQuery);
  R* const ranged_queries = reinterpret_cast<R*>(shared + L::kRangedQuery);
  T* const keys = reinterpret_cast<T*>(shared + L::kKey);
  T* const given_values = reinterpret_cast<T*>(shared + L::kValue);
  R* const values = reinterpret_cast<R*>(shared + L::kValue);
  T* const given_grad_out = reinterpret_cast<T*>(shared + L::kGradOut);
  R* const grad_out = reinterpret_cast<R*>(shared + L::kGradOut);
  R* const summed = reinterpret_cast<R*>(shared + L::kSummed);
  R* const pairs = reinterpret_cast<R*>(shared + L::kPairs);
  R* const pair_rest = kIs16Bit<T> ? reinterpret_cast<R*>(shared + L::kPairRest) : nullptr;
  float* const lse = reinterpret_cast<float*>(shared + L::kLse);
  float* const delta = reinterpret_cast<float*>(shared + L::kDelta);
  const auto* place = reinterpret_cast<const CausalQueryPlace<T>*>(shared + L::kPlace);
  const int tid = threadIdx.x;
  const int heads = static_cast<int>(p.query.heads), features = static_cast<int>(p.features);
  const Warp own = {p.map, p.map.unit()};

  if (tid == 0) {
    const WorkTile work = GetWorkTile(p.work, blockIdx.x);
    const int64_t head = blockIdx.y, each = heads / p.groups, group = head / each;
    const int64_t row0 = work.first_row + work.begin, at = row0 * heads + head;
    const int64_t state =
        (p.before_each ? blockIdx.x : (p.before_count == 1 ? 0 : work.sequence)) * p.groups + group;
    *const_cast<CausalQueryPlace<T>*>(place) = {
        p.query.Row(row0, head),
        p.grad_out.Row(row0, head),
        p.lse + at,
        p.delta + at,
        p.grad_query.Row(row0, head),
        p.sum_query == nullptr ? nullptr : p.sum_query + at * W,
        kDelta ? p.corrected_delta + at : nullptr,
        !kDelta && head % each == 0
            ? p.chunk_log_mass + (ChunkSlot(blockIdx.x, row0, C) * p.groups + group) * features
            : nullptr,
        p.projection.At(QueryHeadIndex(p.projection.heads, head, heads, group), p.features_pad, W),
        p.key_operands + p.key_head_step * group * (W * L::kSize / 4),
        p.feature_bias + QueryHeadIndex(p.feature_bias_heads, head, heads, group) * features,
        p.before_log_mass + state * features,
        p.before_mean + state * features * p.keys.value.width};
  }
  KeyStream<T, W, kThreads, C> stream(p.keys, p.map, GetWorkTile(p.work, blockIdx.x),
                                      blockIdx.y / (heads / p.groups), shared + L::kStream, tid);
  const int rows = stream.place->rows, chunks = static_cast<int>(CeilDiv(rows, C));

#pragma unroll 1
  for (int first_feature = 0; first_feature < features; first_feature += L::kFeatures) {
    const bool is_first = first_feature == 0, is_last = first_feature + L::kFeatures >= features;
    __syncthreads();  // nobody reads the last features any more
    CopyOperand<T, W, L::kFeatures, kThreads>(projection, place->projection + first_feature * W,
                                              static_cast<int>(p.features_pad) - first_feature,
                                              tid);
    CpAsyncCommit();
    if constexpr (kHasRanged<T>) {
      CpAsyncWait<0>();
      MakeRanged<T, W, L::kFeatures, kThreads>(ranged_projection, projection, tid);
    }
    stream.Fetch(0, tid);

    // The state: log_mass = anchor + log(mass), mean = sum / mass.
    float sum[W / 8][4], mass[2], anchor[2], base[2];
    float sum_projection[1][W / 8][4] = {}, sum_bias[2] = {};
    {
      const int lane = tid % 32, g = lane / 4, t = lane % 4, width = p.keys.value.width;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int feature = first_feature + tid / 32 * 16 + g + 8 * e;
        const bool given = feature < features;
        const float log_mass = given ? place->log_mass[feature] : -kInfinity;
        base[e] = given ? place->feature_bias[feature] * p.map.inverse_root : 0.f;
        mass[e] = log_mass == -kInfinity ? 0.f : 1.f;
        anchor[e] = log_mass == -kInfinity ? 0.f : log_mass * p.map.inverse_root;
#pragma unroll
        for (int n = 0; n < W / 8; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int column = n * 8 + 2 * t + c;
            sum[n][2 * e + c] = log_mass != -kInfinity && column < width
                                    ? place->mean[static_cast<int64_t>(feature) * width + column]
                                    : 0.f;
          }
      }
    }

#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      stream.Publish(0, tid);
      __syncthreads();  // [0] nobody reads the last chunk any more
      {
        const int first = chunk * C;
        const auto valid = [&](int r) { return first + r < rows; };
        CopyRows<T, W, C, kThreads>(queries, place->query, first, p.query, tid, valid);
        CopyRows<T, W, C, kThreads>(given_grad_out, place->grad_out, first, p.grad_out, tid, valid);
        stream.Issue(chunk, 0, keys, given_values, tid);
        stream.Fetch(chunk + 1, tid);
        if (tid < C)
          LoadStatistics(lse + tid, delta + tid, place->lse, place->delta,
                         static_cast<int64_t>(first + tid) * heads, valid(tid), p.map);
        CpAsyncWait<0>();
        stream.Arrived(0, keys, tid);
        MakeRanged<T, W, C, kThreads>(values, given_values, tid);
        MakeRanged<T, W, C, kThreads>(grad_out, given_grad_out, tid);
        MakeRanged<T, W, C, kThreads>(ranged_queries, queries, tid);
      }
      __syncthreads();  // [1] the chunk is complete
      const int id = Opaque(tid), lane = id % 32, warp = id / 32, row0 = warp * 16;
      const int r0 = warp % (C / 16) * 16, part = warp / (C / 16);
      StorePairGradients<T, W, L::kPairColumns>(pairs, pair_rest, grad_out, values, delta, r0,
                                                part * L::kPairColumns, lane);
      if (place->chunk_log_mass != nullptr && lane % 4 == 0)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int feature = first_feature + row0 + lane / 4 + 8 * e;
          if (feature < features)
            place->chunk_log_mass[chunk * p.groups * features + feature] =
                mass[e] == 0.f ? -kInfinity : anchor[e] * p.map.root + logf(mass[e]);
        }
      __syncthreads();  // [2] dA is visible

#pragma unroll 1
      for (SubChunk sub_chunk = {0, 0}; sub_chunk.end < C;) {
        uint32_t kb[C / 16][kFragment<R>];
        float keys_sum[2];
        {
          typename Warp::Keys x;
          const uint32_t* operands =
              place->key_operands + static_cast<int64_t>(first_feature + row0) * (W * L::kSize / 4);
          // Past the last features: those of the first ones, whose logits are replaced.
          if (first_feature + row0 >= p.features_pad) operands = place->key_operands;
          own.KeyLogits(
              x,
              [&](uint32_t (&a)[kFragment<T>], int s, int lane) {
                LoadOperand<T>(a, operands + s * 32 * kFragment<T>, lane);
              },
              keys, stream.bias, features - first_feature - row0, lane);
          float log_mass[2], next[2];
#pragma unroll
          for (int e = 0; e < 2; ++e)
            log_mass[e] = mass[e] == 0.f ? -kInfinity : anchor[e] + Log2(mass[e]) / own.unit;
          sub_chunk = own.FindSubChunk(x, stream.bias, sub_chunk.end, log_mass, next, lane);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float keep = mass[e] == 0.f ? 0.f : Exp2((anchor[e] - next[e]) * own.unit);
            anchor[e] = next[e];
            mass[e] *= keep;
#pragma unroll
            for (int n = 0; n < W / 8; ++n) sum[n][2 * e] *= keep, sum[n][2 * e + 1] *= keep;
          }
          own.WeighKeys(x, sub_chunk, anchor, keys_sum, lane);
#pragma unroll
          for (int s = 0; s < C / 16; ++s) PackA<R>(kb[s], x[0][2 * s], x[0][2 * s + 1]);
          // Of the rounded weights, as in `sum`: their errors cancel in sum . grad_out - delta
          // mass.
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float all = 0;
#pragma unroll
            for (int s = 0; s < C / 16; ++s) all += OperandSum<R>(kb[s], e);
            keys_sum[e] = QuadSum(all);
          }
        }
#pragma unroll 1
        for (int i0 = 0; i0 < C; i0 += kStep) {
          const int at = Opaque(lane), t = at % 4;
          BackwardTile<1> f, da;
          {
            const float shift[2] = {anchor[0] + base[0], anchor[1] + base[1]};
            own.template QueryFeatures<kStep>(
                f,
                [&](uint32_t (&a)[kFragment<T>], int s, int lane) {
                  LoadA<T, W>(a, projection, row0, s * 16, lane);
                },
                queries, lse, i0, sub_chunk, shift, lane);
          }
#pragma unroll
          for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              da[0][n][i] = -delta[i0 + n * 8 + 2 * t + (i & 1)] * mass[i / 2];
          StateProduct<R, W, kStep>(da, sum, grad_out, i0, at);
#pragma unroll
          for (int s = 0; s < C / 16; ++s)
#pragma unroll
            for (int n = 0; n < kStep / 16; ++n) {
              if (s * 16 > i0 + n * 16) continue;  // above the triangle
              uint32_t b[kFragment<R>];
              if constexpr (kIs16Bit<R>) {
                LoadB<R, C>(b, pair_rest, i0 + n * 16, s * 16, at);
                Mma<R>(da[0][2 * n], da[0][2 * n + 1], kb[s], b);
              }
              LoadB<R, C>(b, pairs, i0 + n * 16, s * 16, at);
              Mma<R>(da[0][2 * n], da[0][2 * n + 1], kb[s], b);
            }
#pragma unroll
          for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              float& y = da[0][n][i];
              y = f[0][n][i] == 0.f ? 0.f : y * f[0][n][i];
              sum_bias[i / 2] += y;
            }
          if constexpr (!kDelta) {
            if (!p.map.linear()) ChainSlope<T, W, 1>(da, p.map, projection, row0, queries, i0, at);
            SumTokens<R, W, 1>(sum_projection, da, ranged_queries, i0, at);
          }
          if (sub_chunk.begin > 0) {
            LoadSummed<R, 1, kStep, C>(f, summed, row0, i0, at);
#pragma unroll
            for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) da[0][n][i] += f[0][n][i];
          }
          StoreSummed<R, 1, kStep, C>(summed, da, row0, i0, at);
        }
#pragma unroll
        for (int s = 0; s < C / 16; ++s)
#pragma unroll
          for (int n = 0; n < W / 16; ++n) {
            uint32_t b[kFragment<R>];
            LoadBTrans<R, W>(b, values, s * 16, n * 16, lane);
            Mma<R>(sum[2 * n], sum[2 * n + 1], kb[s], b);
          }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          mass[e] += keys_sum[e];
          anchor[e] = ZeroIfNone(anchor[e]);
        }
      }
      __syncthreads();  // [3] da is visible
      if constexpr (kDelta) {
        if (part > 0) continue;  // the chunk is done
        float total[2] = {};
        TotalOfFeatures<R, L::kFeatures, C>(total, summed, r0, lane);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int r = r0 + lane / 4 + 8 * e, row = chunk * C + r;
          const float all = QuadSum(total[e]);
          if (row >= rows || lane % 4 != 0) continue;
          float* const to = place->corrected_delta + static_cast<int64_t>(row) * heads;
          *to = (is_first ? delta[r] : *to) + all;
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < L::kWarpColumns; i += L::kColumns) {
          const int c0 = part * L::kWarpColumns + i;
          float dq[L::kColumns / 8][4] = {}, unused[2];
          SumFeatures<R, W, L::kFeatures, L::kColumns, false, C>(dq, unused, summed,
                                                                 ranged_projection, r0, c0, lane);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int row = chunk * C + r0 + lane / 4 + 8 * e;
            if (row >= rows) continue;
            T* to = place->grad_query + static_cast<int64_t>(row) * p.grad_query.stride;
#pragma unroll
            for (int n = 0; n < L::kColumns / 8; ++n) {
              const int column = c0 + n * 8 + 2 * (lane % 4);
              float2 y = {dq[n][2 * e] * p.map.root, dq[n][2 * e + 1] * p.map.root};
              if (AddPart(y, place->sum_query, static_cast<int64_t>(row) * heads * W + column,
                          is_first, is_last))
                StoreColumns(to, column, p.grad_query.width, p.grad_query.aligned, y.x, y.y);
            }
          }
        }
      }
    }

    if constexpr (!kDelta) {
      const int lane = tid % 32, row0 = first_feature + tid / 32 * 16;
      const int64_t at = static_cast<int64_t>(blockIdx.x) * heads + blockIdx.y;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int feature = row0 + lane / 4 + 8 * e;
        const float all = QuadSum(sum_bias[e]);
        if (lane % 4 == 0 && feature < features) p.part_feature_bias[at * features + feature] = all;
      }
      StoreSums<W, 1>(p.part_projection + at * features * p.query.width, p.query.width, features,
                      row0, sum_projection, p.map.root, lane);
    }
  }
}

template <class T, int W, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 1) CausalDqKernel(CausalDqParams<T> p) {
  CausalDq<T, W, kWarps, false>(p);
}

// The sweep before that one, for 16 bits; it only corrects delta. What the forward pass rounded
// otherwise than the sweeps do would be the largest part of their errors: with the delta that comes
// out, the sum of a row's da over all features is 0, as it should be.
template <class T, int W, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 1) CausalDeltaKernel(CausalDqParams<T> p) {
  CausalDq<T, W, kWarps, true>(p);
}

}  // namespace cuda
}  // namespace performer
