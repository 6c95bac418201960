// Parameters of the causal kernel, its block pointers, and its division of features, rows and
// shared memory.
#pragma once
#include "core/causal_cut.h"
#include "cuda/device/row_pipeline.cuh"

namespace performer {
namespace cuda {

// The pointers of a block of the causal kernel, in shared memory as KeyPointers. Rows start at the
// split's first row, and heads at the block's.
template <class T>
struct CausalPointers {
  const T* query;             // [rows, H, D]
  T* out;                     // [rows, H, E]
  const float* feature_bias;  // [M]
  const uint32_t* operands;   // of the key projection, from the block's first feature on
  int64_t row;                // of the tensor
};

// What the causal kernels and those of their gradient are given.
template <class T>
struct CausalRowsParams : QueryParams<T> {
  KeyParams<T> keys;
  // The state before each split [splits, G, M(, E)] if before_each, else before each sequence
  // [before_count, G, M(, E)].
  const float* before_log_mass = nullptr;
  const float* before_mean = nullptr;
  bool before_each = false;
  int64_t before_count = 0;  // 0: none, 1 or N
};

template <class T>
struct CausalParams : CausalRowsParams<T> {
  Projection<T> projection;                // of queries
  const uint32_t* key_operands = nullptr;  // projections of keys, see PackOperandsKernel
  int64_t key_head_step = 0;               // rows between heads' operands: features_pad or 0
  int64_t operand_row = 0;                 // registers of one feature
  RowsOf<T> out;                           // [B L, H, E]
  float* log_mass = nullptr;               // [N, G, M]: the final state
  float* mean = nullptr;                   // [N, G, M, E]
  // [feature blocks][B L, H, W]: the outputs of each feature block, instead of out; or nullptr.
  float* part_out = nullptr;
  // [feature blocks][B L, H] each, or nullptr: what the row's features are relative to, in units of
  // root, -inf where it sees no key; and log2 of the sum relative to it.
  float *row_max = nullptr, *log_sum = nullptr;
  int64_t part_size = 0, part_rows = 0;  // elements of part_out and row_max for one feature block

  PERFORMER_DEVICE int64_t group_of(int64_t head) const {
    return head / (this->query.heads / this->groups);
  }
};

// kFeatureTiles: features of a warp's state, in 16s. kSmall: a block with kSmallSharedBytes, for
// W = 64.
template <class T, int W, int kFeatureTiles, bool kSmall>
struct CausalLayout {
  // A wide float32 state fills the registers, which leaves room for 4 warps.
  static constexpr int kWarps = !kIs16Bit<T> && (W > 64 || kSmall) ? 4 : 8, kThreads = 32 * kWarps;
  static constexpr int kChunk = 8 * kWarps;  // rows
  static constexpr int kFeatures = 16 * kWarps * kFeatureTiles;
  static constexpr int kRowTiles = kChunk / 16;
  static_assert(kWarps == 2 * kRowTiles, "two warps for each 16 queries");
  // Features that queries read at once: their features and the sums of wide heads share registers.
  static constexpr int kMaxAtOnce = W > 64 ? 32 : 64;
  static constexpr int kQueryTile = kFeatures / 2 < kMaxAtOnce ? kFeatures / 2 : kMaxAtOnce;
  // Of tiles: the next chunk is copied while one is worked on. One where two would not fit.
  static constexpr int kStages = kIs16Bit<T> && W == 64 && !kSmall ? 2 : 1;
  // Nats by which a key may exceed its anchor.
  static constexpr float kMaxGrowth =
      std::is_same_v<T, Half> ? kCausalCutNatsOfHalf : kCausalCutNats;

  // Shared memory, in bytes.
  static constexpr int kSize = static_cast<int>(sizeof(T));
  static constexpr int kTileBytes = kChunk * W * kSize;
  static constexpr int kProjection = 0;                                  // [kFeatures][W]
  static constexpr int kQuery = kProjection + kFeatures * W * kSize;     // [kStages] tiles
  static constexpr int kKey = kQuery + kStages * kTileBytes;             // likewise
  static constexpr int kValue = kKey + kStages * kTileBytes;             // likewise
  static constexpr int kWeights = kValue + kStages * kTileBytes;         // kb [kFeatures][kChunk]
  static constexpr int kBefore = kWeights + kFeatures * kChunk * kSize;  // [kFeatures][W]
  // Peers exchange their sums here, once kb and the state before are done with: local, half of num,
  // row_max and den of each thread.
  static constexpr int kExchange = kWeights;
  static constexpr int kExchangeFloats = kChunk / 2 + W / 4 + 4;
  static constexpr int kShared = kFeatures * (kChunk + W) * kSize;
  static constexpr int kExchangeBytes = kThreads * kExchangeFloats * 4;
  static constexpr int kAnchor = kWeights + (kShared > kExchangeBytes ? kShared : kExchangeBytes);
  static constexpr int kMass = kAnchor + kFeatures * 4;  // float [kFeatures] each
  static constexpr int kStream = kMass + kFeatures * 4;
  static constexpr int kPoison = kStream + KeyStream<T, W, kThreads, kChunk>::kSharedBytes;
  static constexpr int kCuts = kPoison + W * 4;  // int [kWarps]
  static constexpr int kPointers = kCuts + kWarps * 4;
  static constexpr int kBytes = kPointers + static_cast<int>(sizeof(CausalPointers<T>));
  static_assert(kBytes <= (kSmall ? kSmallSharedBytes : kMaxSharedBytes));
};

// Neither infinite nor NaN.
PERFORMER_DEVICE bool IsFinite(BFloat16 x) { return (x.bits & 0x7f80) != 0x7f80; }
PERFORMER_DEVICE bool IsFinite(Half x) { return (x.bits & 0x7c00) != 0x7c00; }
PERFORMER_DEVICE bool IsFinite(float x) { return (AsBits(x) & 0x7f800000u) != 0x7f800000u; }

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
