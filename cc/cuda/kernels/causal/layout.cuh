// Parameters of the causal kernels, their block pointers, and the division of shared memory.
#pragma once
#include "core/causal_cut.h"
#include "cuda/device/row_pipeline.cuh"

namespace performer {
namespace cuda {

// The state before each tile of kTile rows, of the rows of its split alone, as operands. That before
// the first tile of a split is empty and is not stored. Means may be stored before each second tile
// of a split only.
template <class T>
struct Checkpoints {
  T* mean = nullptr;          // [tiles of means, G, M_pad, W]
  float* log_mass = nullptr;  // [tiles, G, M_pad] in units of root, -inf past M
};

// What the causal kernels and those of their gradient are given.
template <class T>
struct CausalRowsParams : QueryParams<T> {
  KeyParams<T> keys;
  // log_mass of the state before each split [splits, G, M] if before_each, else before each
  // sequence [before_count, G, M]; and its means as operands, [.., G, M_pad, W].
  const float* before_log_mass = nullptr;
  const T* before_operand = nullptr;
  bool before_each = false;
  int64_t before_count = 0;  // 0: none, 1 or N
};

// Of a kernel whose blocks have a tile of kTile rows each.
template <class T>
struct CausalTileParams : CausalRowsParams<T> {
  Projection<T> projection;                // of queries
  const uint32_t* key_operands = nullptr;  // projections of keys, see PackOperandsKernel
  int64_t key_head_step = 0;               // rows between heads' operands: features_pad or 0
  WorkTiles splits;                        // work: the tiles of kTile rows
  WorkTiles means;                         // rows from one mean of the checkpoints to the next
  Checkpoints<T> checkpoints;
};

template <class T>
struct CausalParams : CausalTileParams<T> {
  RowsOf<T> out;  // [B L, H, E]
};

// The pointers of such a block, in shared memory as KeyPointers. Rows start at the tile's first row,
// and heads at the block's.
template <class T>
struct CausalPointers {
  const T* query;                // [rows, H, D]
  T* result;                     // [rows, H, E or D]: the output, or the gradient of queries
  const T* projection;           // [M_pad, W]: of queries
  const uint32_t* operands;      // of the key projection
  const float* feature_bias;     // [M]
  const T* before_mean;          // [M_pad, W]: the state before the split, nullptr if it is empty
  const float* before_log_mass;  // [M]
  const T* mean;                 // [M_pad, W]: of the last checkpoint, nullptr if that is empty
  const float* log_mass;         // [M_pad]: of the rows of the split before the tile, or nullptr
};

// By one thread. `number`: of the tile. `result`: what the kernel stores of each query row.
template <class T, int W>
PERFORMER_DEVICE CausalPointers<T> MakeCausalPointers(const CausalTileParams<T>& p,
                                                      const WorkTile& work, int64_t number,
                                                      const RowsOf<T>& result) {
  const int64_t head = blockIdx.y, heads = p.query.heads, group = head / (heads / p.groups);
  const int64_t row = work.first_row + work.begin, pad = p.features_pad;
  const int64_t split_rows = WorkTileRows(p.splits, work.rows), split = work.begin / split_rows;
  const int64_t before = (p.before_each         ? FirstWorkTile(p.splits, work.sequence) + split
                          : p.before_count == 1 ? 0
                                                : work.sequence) *
                             p.groups +
                         group;
  const bool any_before = p.before_count > 0 || split > 0;
  const int64_t in_split = work.begin % split_rows;
  const int64_t checkpoint = number * p.groups + group;
  const int64_t mean =
      (FirstWorkTile(p.means, work.sequence) + work.begin / p.means.unit) * p.groups + group;
  return {p.query.Row(row, head),
          result.Row(row, head),
          p.projection.At(QueryHeadIndex(p.projection.heads, head, heads, group), pad, W),
          p.key_operands + p.key_head_step * group * (W * static_cast<int>(sizeof(T)) / 4),
          p.feature_bias + QueryHeadIndex(p.feature_bias_heads, head, heads, group) * p.features,
          any_before ? p.before_operand + before * pad * W : nullptr,
          any_before ? p.before_log_mass + before * p.features : nullptr,
          in_split >= p.means.unit ? p.checkpoints.mean + mean * pad * W : nullptr,
          in_split > 0 ? p.checkpoints.log_mass + checkpoint * pad : nullptr};
}

template <class T, int W>
struct CausalLayout {
  using Weight = T;  // of kb, and of the state relative to anchors
  // Whether a key that is NaN begins a sub-chunk. Here it need not: products of keys come before the
  // causal mask, which selects.
  static constexpr bool kCutsNan = false;
  // Whether values are less an origin.
  static constexpr bool kHasOrigin = false;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kFeatures = 16 * kWarps;  // of a feature block: 16 of each warp
  static_assert(kTile == 16 * kWarps && kFeatures == kFeatureUnit, "a warp has 16 queries");
  // Of feature blocks: the next one is copied while one is worked on. One where two would not fit.
  static constexpr int kStages = kIs16Bit<T> && W <= 128 ? 2 : 1;
  // Nats by which a key may exceed its anchor.
  static constexpr float kMaxGrowth =
      std::is_same_v<T, Half> ? kCausalCutNatsOfHalf : kCausalCutNats;

  // Shared memory, in bytes.
  static constexpr int kSize = static_cast<int>(sizeof(T));
  static constexpr int kTileBytes = kTile * W * kSize, kFeatureBytes = kFeatures * W * kSize;
  static constexpr int kQuery = 0;         // [kTile][W]
  static constexpr int kKey = kTileBytes;  // likewise; values, when keys are done with
  static constexpr int kProjection = kKey + kTileBytes;  // [kStages] of [kFeatures][W]
  static constexpr int kState = kProjection + kStages * kFeatureBytes;  // likewise
  static constexpr int kWeights = kState + kStages * kFeatureBytes;     // kb [kFeatures][kTile]
  static constexpr int kAnchor = kWeights + kFeatures * kTile * kSize;  // float [kFeatures] each
  static constexpr int kMass = kAnchor + kFeatures * 4;
  static constexpr int kShares = kMass + kFeatures * 4;    // float2 [kFeatures]
  static constexpr int kPoison = kShares + kFeatures * 8;  // int [W]
  static constexpr int kCuts = kPoison + W * 4;            // int [kWarps]
  static constexpr int kStream = kCuts + kWarps * 4;
  static constexpr int kPointers = kStream + KeyStream<T, W, kThreads>::kSharedBytes;
  static constexpr int kBytes = kPointers + static_cast<int>(sizeof(CausalPointers<T>));
  static_assert(kStream % 8 == 0 && kPointers % 8 == 0 && kBytes <= MaxSharedBytes(W, kWarps));
};

// An A operand in global memory, as PackOperandsKernel writes it.
template <class T>
PERFORMER_DEVICE void LoadOperand(uint32_t (&a)[kFragment<T>], const uint32_t* from, int lane) {
#pragma unroll
  for (int i = 0; i < kFragment<T>; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(from + lane * kFragment<T> + i);
    a[i] = four.x, a[i + 1] = four.y, a[i + 2] = four.z, a[i + 3] = four.w;
  }
}

}  // namespace cuda
}  // namespace performer
