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
  WorkTiles splits, checkpoint_tiles;        // see ReverseStatesParams
  const float* tile_log_mass = nullptr;      // [tiles, G, M_pad], see causal/layout.cuh
  ReverseCheckpoints<T> reverse;
  StatesAfterSplits after;
  RowsOf<T> grad_key;          // [B S, G, D]
  RowsOf<T> grad_value;        // [B S, G, E]
  float* grad_bias = nullptr;  // [B, G, S] or nullptr
  int64_t bias_rows = 0;       // S
  // Of the kernel of the projection's gradient.
  int64_t feature_blocks = 0;
  float* part_projection = nullptr;  // [splits, G, M, D]
};

// What a block has of each feature.
enum KeyNumber {
  kMass,           // r of the checkpoint, and then of the state after the tile
  kReference,      // the log_mass that R and r of the checkpoint are relative to, see there
  kFactor,         // of R of the checkpoint
  kAfterMass,      // r after the split
  kAfterLogMass,   // log_mass there
  kAfterFactor,    // of R there
  kBeforeLogMass,  // before the split
  kTileLogMass,    // of the rows of the split up to the tile's end
  kKeyNumbers
};

// The pointers of a block, in shared memory as KeyPointers. Rows start at the tile's first row.
template <class T>
struct CausalDkvPointers {
  const T *query, *grad_out;        // [rows, H, D or E], from the group's first head on
  RowStatistics statistics;         // [rows, H], likewise
  T *grad_key, *grad_value;         // [rows, G, D or E], at the block's head
  float* grad_bias;                 // [rows], or nullptr
  const T* projection;              // [M_pad, W]
  const ReverseNumber<T>* reverse;  // [M_pad, W]: R of the next checkpoint
  const ReverseNumber<T>* after;    // [M_pad, W]: R after the split
  // [M_pad] each, of a KeyNumber; the last one is nullptr unless the block advances.
  const float* numbers[kKeyNumbers];
  const float* origin;  // [W], or nullptr in 16 bits
  int next_rows;        // rows of the next tile if the checkpoint is that after it, else 0
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
  static constexpr bool kAdvances = kCheckpointTiles<T, W> > 1;
  // Rows of 512 bytes leave room for grad_out only where the feature blocks are: it is there before
  // and after them. So do narrower ones in float32.
  static constexpr bool kSharesGradOut = !kIs16Bit<T> || W > 128;

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
  // [kStages] of the projection, then R, [kFeatures][W] each
  static constexpr int kStageBytes = 2 * kFeatureBytes;
  static constexpr int kStage = kQueryFeatures + kFeatures * kTile * 4;
  // R in bfloat16 [kFeatures][kSlice<W>], in 16 bits; the projection likewise, for half
  static constexpr int kRangedBytes = kFeatureBytes / kSlices<W>;
  static constexpr int kRangedReverse = kStage + kStages * kStageBytes;
  static constexpr int kRangedProjection = kRangedReverse + (kIs16Bit<T> ? kRangedBytes : 0);
  static constexpr int kAfterRanged = kRangedProjection + (kHasRanged<T> ? kRangedBytes : 0);
  static constexpr int kGradOut = kSharesGradOut ? kStage : kAfterRanged;
  static_assert(!kSharesGradOut || kStages * kStageBytes >= kTileBytes);
  // float [kStages][kKeyNumbers][kFeatures]
  static constexpr int kNumbers = kSharesGradOut ? kAfterRanged : kGradOut + kTileBytes;
  // Factors of R, float [kFeatures], and of the rows of values, float [kTile]; in 16 bits
  static constexpr int kReverseFactor = kNumbers + kStages * kKeyNumbers * kFeatures * 4;
  static constexpr int kValueFactor = kReverseFactor + (kIs16Bit<T> ? kFeatures * 4 : 0);
  // With kAdvances: queries of the next tile [kTile][W], whose grad_out takes the place of that of
  // the tile while features are walked; what R of the state is relative to, float [kFeatures]; sums
  // of f and of f delta, float [2][2][kFeatures]; the largest of grad_out, float [kWarps];
  // statistics.
  static constexpr int kNextQuery = kValueFactor + (kIs16Bit<T> ? kTile * 4 : 0);
  static constexpr int kStateReference = kNextQuery + kTileBytes;
  static constexpr int kNextSums = kStateReference + kFeatures * 4;
  static constexpr int kLargest = kNextSums + 4 * kFeatures * 4;
  static constexpr int kNextRowMax = kLargest + kWarps * 4;  // float [kTile] each
  static constexpr int kNextDelta = kNextRowMax + kTile * 4;
  // float [kTile] each
  static constexpr int kRowMax = kAdvances ? kNextDelta + kTile * 4 : kNextQuery;
  static constexpr int kDelta = kRowMax + kTile * 4;
  static constexpr int kLogSum = kDelta + kTile * 4;
  static constexpr int kSteep = kLogSum + (kKeepsLogSum<T> ? kTile * 4 : 0);  // int [kWarps]
  static constexpr int kStream = kSteep + kWarps * 4;
  using Stream = KeyStream<T, W, kThreads, kTile, 1>;
  static constexpr int kPointers = kStream + Stream::kSharedBytes;
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
  const int64_t checkpoint =
      FirstWorkTile(p.checkpoint_tiles, work.sequence) + work.begin / p.checkpoint_tiles.unit;
  const int64_t at = checkpoint * groups + group, after = split * groups + group;
  const float* const of_checkpoint = p.reverse.numbers + at * kReverseNumbers * pad;
  const float* const of_split = p.after.numbers + after * kAfterNumbers * pad;
  // Whether the checkpoint lies one tile further.
  const int64_t split_end = min((work.begin / split_rows + 1) * split_rows, work.rows);
  const bool advances = work.end < split_end && work.end % p.checkpoint_tiles.unit != 0;
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
          p.reverse.sum + at * pad * W,
          static_cast<const ReverseNumber<T>*>(p.after.sum) + after * pad * W,
          {of_checkpoint, of_checkpoint + pad, of_checkpoint + 2 * pad,
           of_split + (first_of_split ? pad : 0), of_split + 2 * pad, of_split + 4 * pad,
           of_split + 3 * pad,
           advances ? p.tile_log_mass + ((number + 1) * groups + group) * pad : nullptr},
          OriginOfTile<T, W>(p.origin, split, groups, group, !first_of_split),
          advances ? static_cast<int>(min(work.rows - work.end, int64_t{kTile})) : 0};
}

}  // namespace cuda
}  // namespace performer
