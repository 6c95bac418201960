// Parameters of the causal dkv kernel and of the kernel of the key projection's gradient, their
// block pointers, and the division of shared memory.
#pragma once
#include "cuda/device/shared_sums.cuh"
#include "cuda/kernels/causal_backward/reverse_states.cuh"

namespace performer {
namespace cuda {

template <class T>
struct CausalDkvParams : CausalGradientParams<T> {  // work: tiles of kTile rows
  Projection<T> projection;                         // of keys
  const uint32_t* query_operands = nullptr;  // projections of queries, see PackOperandsKernel
  int64_t query_projections = 0;             // 1, G or H
  WorkTiles splits;
  ReverseCheckpoints<T> reverse;
  // The reverse state after each split, see MergeReverseStatesParams.
  const float *after_mean = nullptr, *after_mass = nullptr, *first_after_mass = nullptr;
  RowsOf<T> grad_key;          // [B S, G, D]
  RowsOf<T> grad_value;        // [B S, G, E]
  float* grad_bias = nullptr;  // [B, G, S] or nullptr
  int64_t bias_rows = 0;       // S
  // Of the kernel of the projection's gradient.
  int64_t feature_blocks = 0;
  float* part_projection = nullptr;  // [splits, G, M, D]
};

// The pointers of a block, in shared memory as KeyPointers. Rows start at the tile's first row.
template <class T>
struct CausalDkvPointers {
  const T *query, *grad_out;             // [rows, H, D or E], from the group's first head on
  RowStatistics statistics;              // [rows, H], likewise
  T *grad_key, *grad_value;              // [rows, G, D or E], at the block's head
  float* grad_bias;                      // [rows], or nullptr
  const T* projection;                   // [M_pad, W]
  const Ranged<T>* reverse;              // [kReverseParts, M_pad, W]: R after the tile
  const float* numbers;                  // [3, M_pad], see ReverseCheckpoints
  const float *after_mean, *after_mass;  // [M, W], [M]: after the split
  const float* origin;                   // [W], or nullptr in 16 bits
};

template <class T, int W>
struct CausalKeyLayout {
  using R = Ranged<T>;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static_assert(kTile == 16 * kWarps, "a warp has 16 keys");
  static constexpr int kFeatures = 32;  // of a feature block
  static_assert(kFeatureUnit % kFeatures == 0);
  // Of feature blocks: the next one is copied while one is worked on.
  static constexpr int kStages = kIs16Bit<T> && W == 64 ? 2 : 1;
  static constexpr int kParts = kReverseParts<T>;
  // float32 has room for grad_out only where the feature blocks are: it is there before and after
  // them.
  static constexpr bool kSharesGradOut = !kIs16Bit<T>;

  // Shared memory, in bytes.
  static constexpr int kSize = static_cast<int>(sizeof(T));
  static constexpr int kTileBytes = kTile * W * kSize, kFeatureBytes = kFeatures * W * kSize;
  static constexpr int kPairBytes = kTile * kTile * kSize;
  static constexpr int kQuery = 0;                    // [kTile][W]
  static constexpr int kKey = kQuery + kTileBytes;    // likewise
  static constexpr int kValue = kKey + kTileBytes;    // likewise
  static constexpr int kPairs = kValue + kTileBytes;  // dA [key][query]
  // Of a feature block: f [kFeatures][kTile], or log-weights float [kTile][kFeatures]
  static constexpr int kQueryFeatures = kPairs + kPairBytes;
  // [kStages] of the projection [kFeatures][W], then R [kParts][kFeatures][W]
  static constexpr int kStageBytes = (1 + kParts) * kFeatureBytes;
  static constexpr int kStage = kQueryFeatures + kFeatures * kTile * 4;
  static constexpr int kRangedProjection = kStage + kStages * kStageBytes;
  static constexpr int kGradOut =
      kSharesGradOut ? kStage : kRangedProjection + (kHasRanged<T> ? kFeatureBytes : 0);
  static_assert(!kSharesGradOut || kStages * kStageBytes >= kTileBytes);
  // float [kStages][3][kFeatures]
  static constexpr int kNumbers = kSharesGradOut ? kRangedProjection : kGradOut + kTileBytes;
  static constexpr int kRowMax = kNumbers + kStages * 3 * kFeatures * 4;  // float [kTile] each
  static constexpr int kDelta = kRowMax + kTile * 4;
  static constexpr int kLogSum = kDelta + kTile * 4;
  static constexpr int kSteep = kLogSum + (kKeepsLogSum<T> ? kTile * 4 : 0);  // int [kWarps]
  static constexpr int kStream = kSteep + kWarps * 4;
  static constexpr int kPointers = kStream + KeyStream<T, W, kThreads>::kSharedBytes;
  static constexpr int kBytes = kPointers + static_cast<int>(sizeof(CausalDkvPointers<T>));
  static_assert(kStream % 8 == 0 && kPointers % 8 == 0 && kBytes <= MaxSharedBytes(W, kWarps));
};

// The pointers of block (tile `number`, group).
template <class T, int W>
PERFORMER_DEVICE CausalDkvPointers<T> MakeCausalDkvPointers(const CausalDkvParams<T>& p,
                                                            const WorkTile& work, int64_t number,
                                                            int64_t group) {
  const int64_t heads = p.query.heads, groups = p.groups, pad = p.features_pad;
  const int64_t head = group * (heads / groups), row0 = work.first_row + work.begin;
  const int64_t split_rows = WorkTileRows(p.splits, work.rows);
  const int64_t split = FirstWorkTile(p.splits, work.sequence) + work.begin / split_rows;
  const bool first_of_split = work.begin % split_rows == 0;
  const int64_t at = number * groups + group, after = (split * groups + group) * p.features;
  const int64_t batch = p.keys.packed ? 0 : work.sequence;
  const int64_t bias =
      (batch * groups + group) * p.bias_rows + (p.keys.packed ? work.first_row : 0) + work.begin;
  return {p.query.Row(row0, head),
          p.grad_out.Row(row0, head),
          StatisticsFrom<T>(p.statistics, row0 * heads + head),
          p.grad_key.Row(row0, group),
          p.grad_value.Row(row0, group),
          p.grad_bias == nullptr ? nullptr : p.grad_bias + bias,
          p.projection.At(p.projection.heads == 1 ? 0 : group, pad, W),
          p.reverse.sum + at * kReverseParts<T> * pad * W,
          p.reverse.numbers + at * 3 * pad,
          p.after_mean + after * W,
          (first_of_split ? p.first_after_mass : p.after_mass) + after,
          OriginOfTile<T, W>(p.origin, split, groups, group, !first_of_split)};
}

}  // namespace cuda
}  // namespace performer
