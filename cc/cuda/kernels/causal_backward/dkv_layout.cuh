// The causal dkv kernel's parameters, block pointers and shared memory, and the gradient of the
// initial state.
#pragma once
#include "cuda/device/shared_sums.cuh"
#include "cuda/kernels/causal_backward/common.cuh"

namespace performer {
namespace cuda {

template <class T>
struct CausalDkvParams : CausalGradientParams<T> {
  Projection<T> projection;                  // of keys
  const uint32_t* query_operands = nullptr;  // projections of queries, see PackOperandsKernel
  int64_t query_projections = 0;             // 1, G or H
  const float* log_mass = nullptr;           // [N, G, M]: the final state
  const float* chunk_log_mass = nullptr;     // [chunks, G, M], of CausalDqKernel
  // Reverse states [splits, G, M, E] and [splits, G, M], of MergeReverseStatesKernel.
  const float *after_mean = nullptr, *after_mass = nullptr;
  RowsOf<T> grad_key;          // [B S, G, D]
  RowsOf<T> grad_value;        // [B S, G, E]
  float* grad_bias = nullptr;  // [B, G, S] or nullptr
  int64_t bias_rows = 0;       // S
  // [B S, G, W], where a gradient is a sum of several parts.
  float *sum_key = nullptr, *sum_value = nullptr;
  float* part_projection = nullptr;  // [splits, G, M, D]
  // The gradient of the initial state, [N, G, M] and [N, G, M, E].
  float *grad_initial_log_mass = nullptr, *grad_initial_mean = nullptr;
};

// The pointers of a block, in shared memory as KeyPointers. Rows start at the split's first row.
template <class T>
struct CausalDkvPointers {
  const T *query, *grad_out;     // [rows, H, D or E], from the group's first head on
  RowStatistics statistics;      // [rows, H], likewise
  T *grad_key, *grad_value;      // [rows, G, D or E], at the block's head
  float *sum_key, *sum_value;    // [rows, G, W], likewise, or nullptr
  float* grad_bias;              // [rows], or nullptr
  const float* chunk_log_mass;   // [chunks, G, M], at the block's head
  const T* projection;           // [M_pad, W]
  const float *before, *after;   // [M]: log_mass before and after the split
  const float* after_mean;       // [M, E]: R of the reverse state after the split
  const float* after_mass;       // [M]: r of it
  const float* before_mean;      // [M, E]: of the state before the split
  float* grad_initial_log_mass;  // [M], nullptr unless this is the sequence's first split
  float* grad_initial_mean;      // [M, E], likewise
  // [W], or nullptr in 16 bits: of the values of the first chunk, and of the others.
  const float *first_origin, *origin;
};

template <class T, int W, int kWarps>
struct CausalDkvLayout : CausalBackwardLayout<T, W, kWarps> {
  using S = CausalBackwardLayout<T, W, kWarps>;
  static constexpr int kProjection = 0;
  static constexpr int kRangedProjection = kHasRanged<T> ? S::kFeatureBytes : 0;
  static constexpr int kReverseState = kRangedProjection + S::kFeatureBytes;  // R
  static constexpr int kKey = kReverseState + S::kFeatureBytes;
  static constexpr int kRangedKey = kKey + (kHasRanged<T> ? S::kTileBytes : 0);
  static constexpr int kValue = kRangedKey + S::kTileBytes;
  static constexpr int kQuery = kValue + S::kTileBytes;
  static constexpr int kGradOut = kQuery + S::kTileBytes;
  static constexpr int kKeyWeights = kGradOut + S::kTileBytes;  // kb
  // Two buffers that are used twice: f and db share one, dA and tril(f kb)^T the other.
  static constexpr int kQueryFeatures = kKeyWeights + S::kSummedBytes;
  static constexpr int kKeyGradients = kQueryFeatures;
  static constexpr int kPairGradients = kQueryFeatures + S::kSummedBytes;
  static constexpr int kPairWeights = kPairGradients;
  static constexpr int kRowMax = kPairGradients + S::kPairBytes;  // float [kRows]
  static constexpr int kDelta = kRowMax + S::kRows * 4;           // float [kRows]
  static constexpr int kLogSum = kDelta + S::kRows * 4;           // float [kRows]
  // float [2][kRows], as given
  static constexpr int kKeyBias = kLogSum + (kKeepsLogSum<T> ? S::kRows * 4 : 0);
  static constexpr int kCounts = kKeyBias + 2 * S::kRows * 4;  // int [kWarps]: sub-chunks
  static constexpr int kStream = kCounts + S::kWarps * 4;
  static constexpr int kPointers = kStream + KeyStream<T, W, S::kThreads, S::kRows>::kSharedBytes;
  static constexpr int kKept =
      (kPointers + static_cast<int>(sizeof(CausalDkvPointers<T>)) + 15) / 16 * 16;
  // dw is kept in shared memory if there is room for it.
  static constexpr int kKeptBytes = KeptSums<W, S::kThreads, true>::kBytes;
  static constexpr bool kKeeps = kKept + kKeptBytes <= S::kMaxBytes;
  using Kept = KeptSums<W, S::kThreads, kKeeps>;
  static constexpr int kBytes = kKept + (kKeeps ? kKeptBytes : 0);
  static_assert(kStream % 8 == 0 && kPointers % 8 == 0 && kBytes <= S::kMaxBytes);
};

// The pointers of block (split, group).
template <class T, int W>
PERFORMER_DEVICE CausalDkvPointers<T> MakeCausalDkvPointers(const CausalDkvParams<T>& p,
                                                            int64_t split, int64_t group) {
  constexpr int C = kChunkRows<T>;
  const WorkTile work = GetWorkTile(p.work, split);
  const int64_t heads = p.query.heads, groups = p.groups, features = p.features;
  const int64_t head = group * (heads / groups), width = p.keys.value.width;
  const int64_t row0 = work.first_row + work.begin, at = row0 * heads + head;
  const int64_t here = row0 * groups + group;
  const int64_t before =
      (p.before_each ? split : (p.before_count == 1 ? 0 : work.sequence)) * groups + group;
  const int64_t after = split * groups + group, state = work.sequence * groups + group;
  const int64_t batch = p.keys.packed ? 0 : work.sequence;
  const int64_t bias =
      (batch * groups + group) * p.bias_rows + (p.keys.packed ? work.first_row : 0) + work.begin;
  const bool first = work.index == 0;
  return {
      p.query.Row(row0, head),
      p.grad_out.Row(row0, head),
      StatisticsFrom<T>(p.statistics, at),
      p.grad_key.Row(row0, group),
      p.grad_value.Row(row0, group),
      p.sum_key == nullptr ? nullptr : p.sum_key + here * W,
      p.sum_value == nullptr ? nullptr : p.sum_value + here * W,
      p.grad_bias == nullptr ? nullptr : p.grad_bias + bias,
      p.chunk_log_mass + (ChunkSlot(split, row0, C) * groups + group) * features,
      p.projection.At(p.projection.heads == 1 ? 0 : group, p.features_pad, W),
      p.before_log_mass + before * features,
      work.last() ? p.log_mass + state * features : p.before_log_mass + (after + groups) * features,
      p.after_mean + after * features * width,
      p.after_mass + after * features,
      p.before_mean + before * features * width,
      first ? p.grad_initial_log_mass + state * features : nullptr,
      first ? p.grad_initial_mean + state * features * width : nullptr,
      OriginOfChunk<T, W>(p.origin, split, groups, group, false),
      OriginOfChunk<T, W>(p.origin, split, groups, group, true)};
}

// The reverse state before the sequence's first row is the gradient of its initial state. Stores
// that of a warp's features, from row0 on.
template <class T, int W>
PERFORMER_DEVICE void StoreInitialGradient(const CausalDkvPointers<T>& pointers,
                                           const WarpFeatures<T, W>& warp, int row0, int features,
                                           int width, const float (&sum)[W / 8][4],
                                           const float (&mass)[2], const float (&anchor)[2],
                                           int lane) {
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int feature = row0 + lane / 4 + 8 * e;
    const bool is_given = feature < features;
    const float log_mass = is_given ? pointers.before[feature] * warp.map.inverse_root : -kInfinity;
    const float keep = warp.Factor(log_mass, anchor[e]);
    float dot = 0;
#pragma unroll
    for (int n = 0; n < W / 8; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = n * 8 + 2 * (lane % 4) + c;
        if (!is_given || column >= width) continue;
        const int64_t at = static_cast<int64_t>(feature) * width + column;
        const float y = keep == 0.f ? 0.f : sum[n][2 * e + c] * keep;
        pointers.grad_initial_mean[at] = y;
        if (keep == 0.f) continue;
        const float less = kIs16Bit<T> ? 0.f : pointers.first_origin[column];
        dot += y * (pointers.before_mean[at] - less);
      }
    dot = QuadSum(dot);
    if (is_given && lane % 4 == 0)
      pointers.grad_initial_log_mass[feature] = keep == 0.f ? 0.f : dot - mass[e] * keep;
  }
}

}  // namespace cuda
}  // namespace performer
