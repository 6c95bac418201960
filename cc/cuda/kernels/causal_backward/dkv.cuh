// Gradient of causal attention, sweep back: with the reverse state (R, r) of causal_backward/reverse_state.cuh relative to the
// anchors, which never fall along the sequence, so that every factor on the way back is <= 1,
//   db = kb (R . v - r + f tril(dA))
//   over tokens      dw = root (db slope) k      R += f grad_out      r += f delta
//   over features   dv = kb^T R + tril(f kb)^T grad_out      dbias_j = sum_m db
//                    dk = root (db slope)^T w - scale k sum_m db
// f, dA and what is made of them: for each query head of the key/value head in turn.
//
// Grid: (splits of all sequences, key/value heads). Masked keys get exactly 0. The block of a
// sequence's first split ends with the gradient of its initial state.
#pragma once
#include "cuda/kernels/causal_backward/dkv_layout.cuh"

namespace performer {
namespace cuda {

template <class T, int W, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 1) CausalDkvKernel(CausalDkvParams<T> p) {
  using L = CausalDkvLayout<T, W, kWarps>;
  using R = Ranged<T>;
  using Warp = WarpFeatures<T, W>;
  constexpr int C = L::kRows, kThreads = L::kThreads, kStep = 32;  // queries at a time
  PERFORMER_SHARED_MEMORY(shared);
  T* const projection = reinterpret_cast<T*>(shared);
  R* const ranged_projection = reinterpret_cast<R*>(shared + L::kRangedProjection);
  R* const reverse_state = reinterpret_cast<R*>(shared + L::kReverseState);
  T* const keys = reinterpret_cast<T*>(shared + L::kKey);
  R* const ranged_keys = reinterpret_cast<R*>(shared + L::kRangedKey);
  T* const given_values = reinterpret_cast<T*>(shared + L::kValue);
  R* const values = reinterpret_cast<R*>(shared + L::kValue);
  T* const queries = reinterpret_cast<T*>(shared + L::kQuery);
  T* const given_grad_out = reinterpret_cast<T*>(shared + L::kGradOut);
  R* const grad_out = reinterpret_cast<R*>(shared + L::kGradOut);
  R* const weights = reinterpret_cast<R*>(shared + L::kWeights);
  R* const summed = reinterpret_cast<R*>(shared + L::kSummed);
  R* const pairs = reinterpret_cast<R*>(shared + L::kPairs);
  float* const lse = reinterpret_cast<float*>(shared + L::kLse);
  float* const delta = reinterpret_cast<float*>(shared + L::kDelta);
  int* const counts = reinterpret_cast<int*>(shared + L::kCounts);
  const auto* place = reinterpret_cast<const CausalKeyPlace<T>*>(shared + L::kPlace);
  const int tid = threadIdx.x;
  const int heads = static_cast<int>(p.query.heads), features = static_cast<int>(p.features);
  const int groups = static_cast<int>(p.groups), each = heads / groups;
  const Warp own = {p.map, p.map.unit()};

  if (tid == 0)
    *const_cast<CausalKeyPlace<T>*>(place) = MakeCausalKeyPlace<T, W>(p, blockIdx.x, blockIdx.y);
  KeyStream<T, W, kThreads, C> stream(p.keys, p.map, GetWorkTile(p.work, blockIdx.x), blockIdx.y,
                                      shared + L::kStream, tid);
  const int rows = stream.place->rows, chunks = static_cast<int>(CeilDiv(rows, C));

  // Starts copying the queries of a chunk, `head` of the group.
  const auto issue_queries = [&](int chunk, int head) {
    const int first = chunk * C;
    const auto valid = [&](int r) { return first + r < rows; };
    CopyRows<T, W, C, kThreads>(queries, place->query + head * p.query.width, first, p.query, tid,
                                valid);
    CopyRows<T, W, C, kThreads>(given_grad_out, place->grad_out + head * p.grad_out.width, first,
                                p.grad_out, tid, valid);
    CpAsyncCommit();
    if (tid < C)
      LoadStatistics(lse + tid, delta + tid, place->lse, place->delta,
                     static_cast<int64_t>(first + tid) * heads + head, valid(tid), p.map);
  };

#pragma unroll 1
  for (int first_feature = 0; first_feature < features; first_feature += L::kFeatures) {
    const bool first_group = first_feature == 0;
    const bool last_group = first_feature + L::kFeatures >= features;
    __syncthreads();  // nobody reads the last features and keys any more
    CopyOperand<T, W, L::kFeatures, kThreads>(projection, place->projection + first_feature * W,
                                              static_cast<int>(p.features_pad) - first_feature,
                                              tid);
    CpAsyncCommit();
    if constexpr (kHasRanged<T>) {
      CpAsyncWait<0>();
      MakeRanged<T, W, L::kFeatures, kThreads>(ranged_projection, projection, tid);
    }
    stream.Fetch(chunks - 1, tid);

    // The reverse state, relative to exp(reach).
    float sum[1][W / 8][4], mass[2], reach[2];
    typename L::Kept sum_projection(shared + L::kKept, tid);
    {
      const int lane = tid % 32, g = lane / 4, t = lane % 4, width = p.keys.value.width;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int feature = first_feature + tid / 32 * 16 + g + 8 * e;
        const bool given = feature < features;
        reach[e] = given ? place->after[feature] * p.map.inverse_root : -kInfinity;
        mass[e] = given ? place->after_mass[feature] : 0.f;
#pragma unroll
        for (int n = 0; n < W / 8; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int column = n * 8 + 2 * t + c;
            sum[0][n][2 * e + c] =
                given && column < width
                    ? place->after_mean[static_cast<int64_t>(feature) * width + column]
                    : 0.f;
          }
      }
    }

#pragma unroll 1
    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
      float* const hidden =
          reinterpret_cast<float*>(shared + L::kHidden) + (chunk & 1) * C;  // key_bias
      stream.Publish(0, tid);
      __syncthreads();  // [0] nobody reads the last chunk any more
      stream.Issue(chunk, 0, keys, given_values, tid);
      if (chunk > 0) stream.Fetch(chunk - 1, tid);
      if (each == 1) issue_queries(chunk, 0);
      CpAsyncWait<0>();
      stream.Arrived(0, keys, tid);
      if (tid < C) hidden[tid] = stream.raw[tid];
      MakeRanged<T, W, C, kThreads>(values, given_values, tid);
      MakeRanged<T, W, C, kThreads>(ranged_keys, keys, tid);
      if (each == 1) MakeRanged<T, W, C, kThreads>(grad_out, given_grad_out, tid);
      __syncthreads();  // [1] the chunk is complete
      const int id = Opaque(tid), lane = id % 32, warp = id / 32, row0 = warp * 16;
      const int r0 = warp % (C / 16) * 16, part = warp / (C / 16);
      const int given = features - first_feature - row0;

      // Sub-chunk `wanted` of this warp, or the last one if that comes first; returns which.
      typename Warp::Keys x;
      SubChunk sub_chunk;
      float anchor[2];
      const auto find = [&](int wanted) {
        float log_mass[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int feature = lane / 4 + 8 * e;
          log_mass[e] =
              feature < given
                  ? place->chunk_log_mass[static_cast<int64_t>(chunk) * groups * features +
                                          first_feature + row0 + feature] *
                        p.map.inverse_root
                  : -kInfinity;
        }
        sub_chunk = {0, 0};
#pragma unroll 1
        for (int number = 0;; ++number) {
          own.KeyLogits(
              x,
              [&](uint32_t (&a)[kFragment<T>], int s, int lane) {
                LoadA<T, W>(a, projection, row0, s * 16, lane);
              },
              keys, stream.bias, given, lane);
          sub_chunk = own.FindSubChunk(x, stream.bias, sub_chunk.end, log_mass, anchor, lane);
          if (number == wanted || sub_chunk.end == C) return number;
          float added[2];
          own.WeighKeys(x, sub_chunk, anchor, added, lane);
          own.AddKeys(log_mass, anchor, added);
        }
      };
      // The last sub-chunk comes first. Passes are as many as the warp with most sub-chunks has.
      int last_sub_chunk = 0, passes = 1;
#pragma unroll 1
      for (int pass = 0; pass < passes; ++pass) {
        if (pass <= last_sub_chunk) {
          const int number = find(pass == 0 ? C : last_sub_chunk - pass);
          if (pass == 0) {
            last_sub_chunk = number;
            if (lane == 0) counts[warp] = number + 1;
          }
        } else {  // there is none left
          sub_chunk = {0, 0};
          anchor[0] = reach[0], anchor[1] = reach[1];
        }
        float db[1][C / 8][4], added[2];
        const int at = Opaque(lane);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float keep = own.Factor(anchor[e], reach[e]);
          reach[e] = anchor[e];
          mass[e] *= keep;
#pragma unroll
          for (int n = 0; n < W / 8; ++n) {
            float &y0 = sum[0][n][2 * e], &y1 = sum[0][n][2 * e + 1];
            y0 *= keep;
            y1 *= keep;
            StorePair(reverse_state + At<R, W>(row0 + at / 4 + 8 * e, n * 8 + 2 * (at % 4)), y0,
                      y1);
          }
        }
        own.WeighKeys(x, sub_chunk, anchor, added, lane);
        StoreSummed<R, 1, C, C>(weights, x, row0, 0, lane);
#pragma unroll
        for (int n = 0; n < C / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) db[0][n][i] = -mass[i / 2];
        StateProduct<R, W, C>(db, sum[0], values, 0, lane);

#pragma unroll 1
        for (int head = 0; head < each; ++head) {
          if (each > 1) {
            __syncthreads();  // [2] everybody is done with the last queries
            issue_queries(chunk, head);
            CpAsyncWait<0>();
            MakeRanged<T, W, C, kThreads>(grad_out, given_grad_out, tid);
            __syncthreads();  // [3] the queries are complete
          }
          StorePairGradients<T, W, L::kPairColumns>(pairs, static_cast<R*>(nullptr), grad_out,
                                                    values, delta, r0, part * L::kPairColumns,
                                                    lane);
          __syncthreads();  // [4] R, kb, dA and numbers of sub-chunks are visible
          if (pass == 0 && head == 0)
#pragma unroll
            for (int i = 0; i < L::kWarps; ++i) passes = max(passes, counts[i]);
          {
            float shift[2];
            const int64_t query_head = static_cast<int64_t>(blockIdx.y) * each + head;
            const float* feature_bias =
                p.feature_bias +
                QueryHeadIndex(p.feature_bias_heads, query_head, heads, blockIdx.y) * features;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int feature = lane / 4 + 8 * e;
              shift[e] = anchor[e];
              if (feature < given)
                shift[e] += feature_bias[first_feature + row0 + feature] * p.map.inverse_root;
            }
            // Past the last features: the first ones, which weigh nothing.
            const int64_t first = first_feature + row0 < p.features_pad ? first_feature + row0 : 0;
            const uint32_t* operands =
                p.query_operands +
                (QueryHeadIndex(p.query_projections, query_head, heads, blockIdx.y) *
                     p.features_pad +
                 first) *
                    (W * L::kSize / 4);
#pragma unroll 1
            for (int i0 = 0; i0 < C; i0 += kStep) {
              BackwardTile<1, kStep> f;
              own.template QueryFeatures<kStep>(
                  f,
                  [&](uint32_t (&a)[kFragment<T>], int s, int lane) {
                    LoadOperand<T>(a, operands + s * 32 * kFragment<T>, lane);
                  },
                  queries, lse, i0, sub_chunk, shift, lane);
              StoreSummed<R, 1, kStep, C>(summed, f, row0, i0, lane);
#pragma unroll
              for (int s = 0; s < kStep / 16; ++s) {
                uint32_t a[kFragment<R>];
                PackA<R>(a, f[0][2 * s], f[0][2 * s + 1]);
#pragma unroll
                for (int n = 0; n < C / 16; ++n) {
                  if (n * 16 > i0 + s * 16) continue;  // above the triangle
                  uint32_t b[kFragment<R>];
                  LoadBTrans<R, C>(b, pairs, i0 + s * 16, n * 16, lane);
                  Mma<R>(db[0][2 * n], db[0][2 * n + 1], a, b);
                }
              }
              SumTokens<R, W, 1, kStep>(sum, f, grad_out, i0, Opaque(lane));
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                float more = 0;
#pragma unroll
                for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
                  for (int c = 0; c < 2; ++c)
                    more += f[0][n][2 * e + c] * delta[i0 + n * 8 + 2 * (lane % 4) + c];
                mass[e] += QuadSum(more);
              }
            }
          }
          __syncthreads();  // [5] f is visible; dA may be overwritten
          if (part * L::kPairColumns < C) {
            constexpr int kPair = L::kPairColumns;
            float y[kPair / 8][4] = {}, unused[2];
            const int c0 = part * kPair, at = Opaque(lane);
            SumFeatures<R, C, L::kFeatures, kPair, false, C>(y, unused, weights, summed, r0, c0,
                                                             lane);
#pragma unroll
            for (int n = 0; n < kPair / 8; ++n)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const int j = r0 + at / 4 + 8 * e, i = c0 + n * 8 + 2 * (at % 4);
                StorePair(pairs + At<R, C>(j, i), j <= i ? y[n][2 * e] : 0.f,
                          j <= i + 1 ? y[n][2 * e + 1] : 0.f);
              }
          }
          __syncthreads();  // [6] local weights are visible; f may be overwritten
          const bool first_part = first_group && pass == 0 && head == 0;
          const bool last_part = last_group && pass + 1 == passes && head + 1 == each;
#pragma unroll 1
          for (int i = 0; i < L::kWarpColumns; i += L::kColumns) {
            const int c0 = part * L::kWarpColumns + i, at = Opaque(lane);
            float dv[L::kColumns / 8][4] = {}, unused[2];
            if (head == 0)
              SumFeatures<R, W, L::kFeatures, L::kColumns, false, C>(dv, unused, weights,
                                                                     reverse_state, r0, c0, lane);
#pragma unroll(kUnroll<R>)
            for (int s = 0; s < C / 16; ++s) {
              uint32_t a[kFragment<R>];
              LoadA<R, C>(a, pairs, r0, s * 16, at);
#pragma unroll
              for (int n = 0; n < L::kColumns / 16; ++n) {
                uint32_t b[kFragment<R>];
                LoadBTrans<R, W>(b, grad_out, s * 16, c0 + n * 16, at);
                Mma<R>(dv[2 * n], dv[2 * n + 1], a, b);
              }
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int r = r0 + at / 4 + 8 * e, row = chunk * C + r;
              if (row >= rows) continue;
#pragma unroll
              for (int n = 0; n < L::kColumns / 8; ++n) {
                const int column = c0 + n * 8 + 2 * (at % 4);
                float2 y = {dv[n][2 * e], dv[n][2 * e + 1]};
                if (!AddPart(y, place->sum_value, static_cast<int64_t>(row) * groups * W + column,
                             first_part, last_part))
                  continue;
                if (hidden[r] == -kInfinity) y = float2{0.f, 0.f};
                StoreColumns(place->grad_value + static_cast<int64_t>(row) * p.grad_value.stride,
                             column, p.grad_value.width, p.grad_value.aligned, y.x, y.y);
              }
            }
          }
        }

        {  // kb from its tile: registers are short
          float kb[1][C / 8][4];
          LoadSummed<R, 1, C, C>(kb, weights, row0, 0, lane);
#pragma unroll
          for (int n = 0; n < C / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
              db[0][n][i] = kb[0][n][i] == 0.f ? 0.f : kb[0][n][i] * db[0][n][i];
        }
        StoreSummed<R, 1, C, C>(summed, db, row0, 0, lane);
        float total[2] = {};  // of db over features, of the rounded operand: errors cancel in dk
        const bool linear = p.map.linear();
        if (!linear) {
          __syncthreads();  // [7] db is visible
          TotalOfFeatures<R, L::kFeatures, C>(total, summed, r0, lane);
          ChainSlope<T, W, 1, C>(db, p.map, projection, row0, keys, 0, lane);
          __syncthreads();  // [8] db may be overwritten
          StoreSummed<R, 1, C, C>(summed, db, row0, 0, lane);
        }
        sum_projection.template Add<R, C>(db, ranged_keys, lane);
        __syncthreads();  // [9] db slope is visible
        const bool first_part = first_group && pass == 0;
        const bool last_part = last_group && pass + 1 == passes;
#pragma unroll 1
        for (int i = 0; i < L::kWarpColumns; i += L::kColumns) {
          const int c0 = part * L::kWarpColumns + i, at = Opaque(lane);
          float dk[L::kColumns / 8][4] = {}, unused[2];
          if (linear && i == 0)
            SumFeatures<R, W, L::kFeatures, L::kColumns, true, C>(dk, total, summed,
                                                                  ranged_projection, r0, c0, lane);
          else
            SumFeatures<R, W, L::kFeatures, L::kColumns, false, C>(dk, unused, summed,
                                                                   ranged_projection, r0, c0, lane);
          if (i == 0) total[0] = QuadSum(total[0]), total[1] = QuadSum(total[1]);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int r = r0 + at / 4 + 8 * e, row = chunk * C + r;
            if (row >= rows) continue;
            const bool masked = hidden[r] == -kInfinity;
            const float norm = p.map.root * p.map.root * total[e];
#pragma unroll
            for (int n = 0; n < L::kColumns / 8; ++n) {
              const int column = c0 + n * 8 + 2 * (at % 4);
              float2 y = {dk[n][2 * e] * p.map.root, dk[n][2 * e + 1] * p.map.root};
              if (p.map.key_norm) {
                const float2 k = LoadPair(keys + At<T, W>(r, column));
                y.x -= norm * k.x, y.y -= norm * k.y;
              }
              if (!AddPart(y, place->sum_key, static_cast<int64_t>(row) * groups * W + column,
                           first_part, last_part))
                continue;
              if (masked) y = float2{0.f, 0.f};
              StoreColumns(place->grad_key + static_cast<int64_t>(row) * p.grad_key.stride, column,
                           p.grad_key.width, p.grad_key.aligned, y.x, y.y);
            }
            if (c0 != 0 || at % 4 != 0 || place->grad_bias == nullptr) continue;
            float y = total[e];
            if (!first_part) y += place->grad_bias[row];
            place->grad_bias[row] = last_part && masked ? 0.f : y;
          }
        }
      }
    }

    const int lane = tid % 32, row0 = first_feature + tid / 32 * 16;
    float all[1][W / 8][4];
    sum_projection.Read(all);
    StoreSums<W, 1>(p.part_projection + (static_cast<int64_t>(blockIdx.x) * groups + blockIdx.y) *
                                            features * p.keys.key.width,
                    p.keys.key.width, features, row0, all, p.map.root, lane);
    if (place->grad_initial_log_mass != nullptr)
      StoreInitialGradient<T, W>(*place, own, row0, features, p.keys.value.width, sum[0], mass,
                                 reach, lane);
  }
}

}  // namespace cuda
}  // namespace performer
