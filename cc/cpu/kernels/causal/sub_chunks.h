// Causal attention in sub-chunks: what the queries of a sub-chunk need of the keys and of the past,
// and windows of sub-chunks that are kept for them. The driver (pipeline.h) shares these layouts
// with the kernels of every instruction set (causal.h).
#pragma once
#include "cpu/chunks.h"
#include "cpu/memory/layout.h"

namespace performer {
namespace cpu {

// Rows of a chunk whose key features are relative to the same anchors, or steep (key_chain.h).
template <class Acc>
struct CausalSubChunk {
  int64_t row, begin, rows;  // first row in the tensor, first row in its chunk, number of rows
  bool fully_masked;         // these rows see no key at all; then the pointers are not used
  bool steep;                // the key features are log-features, relative to nothing
  bool paired;               // the key features are pairs of bfloat16 (operands.h)
  const Acc* sum;            // [m][e_pad], of the state before
  const Acc* mass;           // [m_pad], of the state before
  const Acc* anchor;         // [m_pad], of the state before
  const Acc* key_features;   // [m][kCausalChunk], columns as in the chunk; paired: pairs of rows
  const Acc* v;              // [rows][e_pad]
};

// A chain of keys, those of one sequence and key/value head, between two windows.
template <class Acc>
struct CausalChain {
  WorkRange range;
  int64_t row;                // where the next sub-chunk begins
  bool done;                  // there is no next sub-chunk, and the final state is written
  SummaryPartial<Acc> state;  // before that row; at range.begin not set
};

// Consecutive sub-chunks of a chain, and memory for what they point to.
template <class Acc>
struct CausalWindow {
  CausalSubChunk<Acc>* sub_chunks;  // [slots]
  Acc* memory;                      // [slots][SlotSize]
  int64_t slots, count;             // sub-chunks that have room, sub-chunks that there are
  // Number of (sub-chunk, query head) items that threads have taken. Each thread counts atomically.
  int64_t taken;

  static PERFORMER_INLINE constexpr int64_t SlotSize(const Strides& strides) {
    return SummaryPartial<Acc>::Size(strides) + (strides.m + strides.e_pad) * kCausalChunk;
  }
  struct Slot {
    SummaryPartial<Acc> state;
    Acc *key_features, *v;  // [m][kCausalChunk], [kCausalChunk][e_pad]
  };
  PERFORMER_INLINE Slot At(int64_t i, const Strides& strides) const {
    Acc* base = memory + i * SlotSize(strides);
    Acc* key_features = base + SummaryPartial<Acc>::Size(strides);
    return {SummaryPartial<Acc>::At(base, strides), key_features,
            key_features + strides.m * kCausalChunk};
  }
  // The next item that no thread has taken; from count * (heads of the group) on there is none.
  PERFORMER_INLINE int64_t Take() { return __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED); }
};

}  // namespace cpu
}  // namespace performer
