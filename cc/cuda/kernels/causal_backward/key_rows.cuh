// The rows and operands of a block of the causal dkv kernel, or of that of the key projection's
// gradient: how they come to shared memory, and the log-weights of queries.
#pragma once
#include "cuda/kernels/causal_backward/key_layout.cuh"

namespace performer {
namespace cuda {

template <class T, int W>
struct CausalKeyRows {
  using L = CausalKeyLayout<T, W>;
  using R = Ranged<T>;
  using N = ReverseNumber<T>;
  static constexpr int kThreads = L::kThreads, kFeatures = L::kFeatures;
  // Of 16 bytes in a row, of which a thread has one in each kRowsAtOnce rows.
  static constexpr int kChunks = W / kChunk<N>, kRowsAtOnce = kThreads / kChunks;

  const CausalDkvParams<T>& p;
  unsigned char* shared;
  int64_t group;

  PERFORMER_DEVICE T* tile(int offset) const { return reinterpret_cast<T*>(shared + offset); }
  PERFORMER_DEVICE R* ranged(int offset) const { return reinterpret_cast<R*>(shared + offset); }
  PERFORMER_DEVICE float* floats(int offset) const {
    return reinterpret_cast<float*>(shared + offset);
  }
  PERFORMER_DEVICE const CausalDkvPointers<T>* pointers() const {
    return reinterpret_cast<const CausalDkvPointers<T>*>(shared + L::kPointers);
  }
  PERFORMER_DEVICE int each() const { return static_cast<int>(p.query.heads / p.groups); }
  PERFORMER_DEVICE T* projection(int stage) const {
    return tile(L::kStage + stage * L::kStageBytes);
  }
  PERFORMER_DEVICE N* reverse(int stage) const {
    return reinterpret_cast<N*>(projection(stage)) + kFeatures * W;
  }
  // R as an operand in the type R, of the feature block that is worked on: [kFeatures][kSlice<W>].
  PERFORMER_DEVICE R* ranged_reverse(int stage) const {
    if constexpr (kIs16Bit<T>)
      return ranged(L::kRangedReverse);
    else
      return reverse(stage);
  }
  PERFORMER_DEVICE N* values() const { return reinterpret_cast<N*>(shared + L::kValue); }
  // The projection as an operand in the type R: [kFeatures][kProjectionColumns].
  static constexpr int kProjectionColumns = kHasRanged<T> ? kSlice<W> : W;
  PERFORMER_DEVICE R* ranged_projection(int stage) const {
    return ranged(kHasRanged<T> ? L::kRangedProjection : L::kStage + stage * L::kStageBytes);
  }
  PERFORMER_DEVICE static int begin() { return SliceBegin<W>(blockIdx.z); }
  // [kFeatures] each.
  PERFORMER_DEVICE float* numbers(int stage, KeyNumber which) const {
    return floats(L::kNumbers) + (stage * kKeyNumbers + which) * kFeatures;
  }
  // Whether the checkpoint is that after the next tile, which the block adds to it.
  PERFORMER_DEVICE bool advances() const { return L::kAdvances && pointers()->next_rows > 0; }
  // What R and r of the state after the tile are relative to; inf where no key has been seen.
  PERFORMER_DEVICE const float* references(int stage) const {
    return advances() ? floats(L::kStateReference) : numbers(stage, kReference);
  }

  // Starts copying the queries of the tile, and grad_out, of query head `head` of the group. With
  // `next`: those of the next tile, whose grad_out takes the place of the tile's.
  PERFORMER_DEVICE void IssueQueries(int head, int rows, int tid, bool next = false) const {
    const int first = next ? kTile : 0;
    const auto valid = [&](int r) { return r < rows; };
    CopyRows<T, W, kTile, kThreads>(tile(next ? L::kNextQuery : L::kQuery),
                                    pointers()->query + head * p.query.width, first, p.query, tid,
                                    valid);
    IssueGradOut(head, rows, tid, first);
    if (tid < kTile)
      LoadStatistics<T>(floats(next ? L::kNextRowMax : L::kRowMax), floats(L::kLogSum),
                        floats(next ? L::kNextDelta : L::kDelta), tid, pointers()->statistics,
                        static_cast<int64_t>(first + tid) * p.query.heads + head, valid(tid));
  }
  PERFORMER_DEVICE void IssueGradOut(int head, int rows, int tid, int first = 0) const {
    CopyRows<T, W, kTile, kThreads>(tile(L::kGradOut),
                                    pointers()->grad_out + head * p.grad_out.width, first,
                                    p.grad_out, tid, [&](int r) { return r < rows; });
    CpAsyncCommit();
  }
  // With advances().
  PERFORMER_DEVICE void IssueNext(int head, int tid) const {
    IssueQueries(head, pointers()->next_rows, tid, true);
  }
  // Once what this thread copied is there.
  PERFORMER_DEVICE void FinishNext(int warp, int tid) const {
    FinishGradOut(tid);
    float largest = 0;
#pragma unroll 1
    for (int n = 0; n < kTile / kRowsAtOnce; ++n) {
      const R* const chunk = ranged(L::kGradOut) +
                             At<R, W>(tid / kChunks + n * kRowsAtOnce, tid % kChunks * kChunk<R>);
      float x[kChunk<R>];
      UnpackChunk<R>(x, *reinterpret_cast<const uint4*>(chunk), 1.f);
      largest = fmaxf(largest, Largest(x));
    }
    largest = WarpMax(largest);
    if (tid % 32 == 0) floats(L::kLargest)[warp] = largest;
  }
  // Once what this thread copied is there.
  PERFORMER_DEVICE void FinishKeys(int tid) const {
    if constexpr (!kIs16Bit<T>)
      SubtractOrigin<T, W, kTile, kThreads>(tile(L::kValue), pointers()->origin, tid);
    if constexpr (std::is_same_v<T, BFloat16>) MakeValuesHalf(tid);
  }
  // In place, with a factor for each row.
  PERFORMER_DEVICE void MakeValuesHalf(int tid) const {
    tid = Opaque(tid);
#pragma unroll 2
    for (int n = 0; n < kTile / kRowsAtOnce; ++n) {
      const int row = tid / kChunks + n * kRowsAtOnce;
      uint4& chunk =
          *reinterpret_cast<uint4*>(tile(L::kValue) + At<T, W>(row, tid % kChunks * kChunk<T>));
      float x[kChunk<T>];
      UnpackChunk<T>(x, chunk, 1.f);
      const HalfScale scale = ScaleOfHalf(LargestOfLanes<kChunks>(Largest(x)));
      chunk = PackChunk<Half>(x, scale.to_half);
      if (tid % kChunks == 0) floats(L::kValueFactor)[row] = scale.from_half;
    }
  }
  // Of row e of a thread, that of values.
  PERFORMER_DEVICE float ValueFactor(int row0, int e, int lane) const {
    return std::is_same_v<T, BFloat16> ? floats(L::kValueFactor)[row0 + lane / 4 + 8 * e] : 1.f;
  }
  // Values as an operand in the type R.
  PERFORMER_DEVICE void LoadRangedValues(uint32_t (&a)[kFragment<R>], int row0, int s,
                                         int lane) const {
    LoadA<N, W>(a, values(), row0, s * 16, lane);
    if constexpr (kIs16Bit<T>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float factor = ValueFactor(row0, i & 1, lane);
        a[i] = Pack<R>(factor * Low<Half>(a[i]), factor * High<Half>(a[i]));
      }
    }
  }
  PERFORMER_DEVICE void FinishGradOut(int tid) const {
    MakeRanged<T, W, kTile, kThreads>(ranged(L::kGradOut), tile(L::kGradOut), tid);
  }

  // Starts copying a feature block.
  PERFORMER_DEVICE void IssueFeatures(int first, int stage, int tid) const {
    const CausalDkvPointers<T>& from = *pointers();
    const int64_t at = static_cast<int64_t>(first) * W;
    CopyOperand<T, W, kFeatures, kThreads>(projection(stage), from.projection + at, tid);
    CopyOperand<N, W, kFeatures, kThreads>(reverse(stage), from.reverse + at, tid);
    constexpr int kChunksOfRow = kFeatures / 4;
    if (tid < (advances() ? kKeyNumbers : kTileLogMass) * kChunksOfRow)
      CpAsync16(numbers(stage, kMass) + tid * 4,
                from.numbers[tid / kChunksOfRow] + first + tid % kChunksOfRow * 4, true);
    CpAsyncCommit();
  }

  // A warp's part of a feature block in products with queries: 16 features and 32 queries.
  using QueryTile = float[4][4];
  PERFORMER_DEVICE static int Feature0(int warp) { return warp % (kFeatures / 16) * 16; }
  PERFORMER_DEVICE static int Query0(int warp) { return warp / (kFeatures / 16) * 32; }
  static_assert(L::kWarps / (kFeatures / 16) * 32 == kTile);

  // x = log2 of the weights of features, without what comes from keys. base: added to each row of
  // features, in units of root. next: for the next tile.
  PERFORMER_DEVICE void QueryLogWeights(QueryTile& x, const float (&base)[2], int first, int head,
                                        int warp, int lane, bool next = false) const {
    const int t = lane % 4, i0 = Query0(warp);
    const bool linear = p.map.linear();
    const float unit = p.map.unit();
    const float* const row_max = floats(next ? L::kNextRowMax : L::kRowMax);
    const float* const log_sum = floats(L::kLogSum);
    const T* const queries = tile(next ? L::kNextQuery : L::kQuery);
    if (kIs16Bit<T> && linear)
      SetRows(x, row_max + i0 + 2 * t, -1.f);
    else
      SetZero(x);
    const uint32_t* const operands =
        p.query_operands +
        (QueryHeadIndex(p.query_projections, group * each() + head, p.query.heads, group) *
             p.features_pad +
         first + Feature0(warp)) *
            (W * L::kSize / 4);
#pragma unroll(kUnroll<T>)
    for (int s = 0; s < W / 16; ++s) {
      uint32_t a[kFragment<T>];
      LoadOperand<T>(a, operands + s * 32 * kFragment<T>, lane);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint32_t b[kFragment<T>];
        LoadB<T, W>(b, queries, i0 + n * 16, s * 16, lane);
        Mma<T>(x[2 * n], x[2 * n + 1], a, b);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = i0 + n * 8 + 2 * t + (i & 1);
        float& y = x[n][i];
        if (!linear) y = MappedLogit(p.map, y);
        if constexpr (kIs16Bit<T>) {
          if (!linear) y -= row_max[row];
          y = (y + base[i / 2]) * unit;
        } else {  // two large numbers first
          y = (y + (base[i / 2] - row_max[row])) * unit - log_sum[row];
        }
      }
  }

  // feature_bias of a thread's rows of features, in units of root; -inf past the last one.
  PERFORMER_DEVICE void FeatureBias(float (&bias)[2], int first, int head, int warp,
                                    int lane) const {
    const float* const from =
        p.feature_bias +
        QueryHeadIndex(p.feature_bias_heads, group * each() + head, p.query.heads, group) *
            p.features;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int feature = first + Feature0(warp) + lane / 4 + 8 * e;
      bias[e] = feature < p.features ? from[feature] * p.map.inverse_root : -kInfinity;
    }
  }
};

}  // namespace cuda
}  // namespace performer
