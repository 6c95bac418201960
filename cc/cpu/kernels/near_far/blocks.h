// The blocks of exact_window rows of one sequence, and one block of keys in scratch memory.
#pragma once
#include "core/near_far.h"
#include "cpu/chunks.h"
#include "cpu/kernels/key_chunk.h"
#include "cpu/kernels/state.h"

PERFORMER_ISA_BEGIN

// Where the blocks of a sequence lie. Block 0 holds its first row, and may be cut.
struct Blocks {
  int64_t window, phase;  // rows of a whole block; the position of the first row in block 0
  int64_t begin, rows;    // the key rows of the sequence, counted through the tensor
  int64_t query_begin;    // the query row that stands at key row `begin`, counted likewise
  int64_t hidden;         // key rows before the first query

  template <class Params>
  PERFORMER_INLINE Blocks(const Params& params, const WorkRange& range)
      : window(params.attributes.exact_window),
        phase(params.start % window),
        begin(range.begin),
        rows(range.end - range.begin) {
    const Dims& dims = params.dims;
    const int64_t queries = params.offsets ? rows : dims.queries;
    hidden = rows - queries;
    query_begin = (params.offsets ? begin : range.sequence * dims.queries) - hidden;
  }
  PERFORMER_INLINE int64_t count() const { return rows == 0 ? 0 : (phase + rows - 1) / window + 1; }
  PERFORMER_INLINE int64_t Begin(int64_t block) const {
    return begin + (block == 0 ? 0 : block * window - phase);
  }
  PERFORMER_INLINE int64_t End(int64_t block) const {
    return block + 1 < count() ? Begin(block + 1) : begin + rows;
  }
  // The first key row of the block at which a query stands; End(block) if there is none.
  PERFORMER_INLINE int64_t FirstQuery(int64_t block) const {
    const int64_t first = begin + hidden, from = Begin(block), to = End(block);
    return first <= from ? from : first < to ? first : to;
  }
  PERFORMER_INLINE int64_t QueryRow(int64_t key_row) const { return query_begin + key_row - begin; }
  // Rows of the longest block.
  PERFORMER_INLINE int64_t MaxRows() const { return rows < window ? rows : window; }
  // The number of blocks in the final state of a causal call.
  PERFORMER_INLINE int64_t FinalBlocks() const { return NearFarFinalBlocks(phase, rows, window); }
};

// The keys and values of one block. Columns of scores are padded to whole vectors.
template <class Acc>
struct KeyBlock {
  KeyChunk<Acc> keys;
  Acc* panels;        // [ceil(rows / kPanel)][d][kPanel]: k^T
  Acc* value_panels;  // [ceil(rows / kPanel)][e_pad][kPanel]: v^T, of gradients only
  Acc* bias;          // [columns]: key_bias in base 2; -inf where masked and in the padding
  int64_t row, rows;  // first row in the tensor, number of rows

  void SetPointers(Arena& arena, const Strides& strides, int64_t max_rows, bool with_value_panels) {
    const int64_t panel_rows = RoundUp(max_rows, kPanel);
    keys.SetPointers(arena, strides, max_rows);
    panels = arena.Take<Acc>(panel_rows * strides.d);
    value_panels = with_value_panels ? arena.Take<Acc>(panel_rows * strides.e_pad) : nullptr;
    bias = arena.Take<Acc>(RoundUp(max_rows, kPad<Acc>));
  }
  int64_t columns() const { return RoundUp(rows, kPad<Acc>); }

  // Loads n keys. Values are less `centre` [e_pad], if that is not nullptr.
  void Load(const Common& call, const KeySide& side, const Strides& strides, const WorkRange& range,
            int64_t first, int64_t n, const Acc* centre, Prefetcher* prefetcher) {
    row = first, rows = n;
    keys.LoadBias(call, side, range, row, n);
    for (int64_t j = 0; j < columns(); ++j)
      bias[j] = j < n ? kLog2e<Acc> * keys.offset[j] : -kInf<Acc>;
    LoadRows<Acc>(keys.Keys(call, side, range), row, n, keys.skip, keys.k, strides.d_pad,
                  prefetcher);
    LoadRows<Acc>(keys.Values(call, side, range), row, n, keys.skip, keys.v, strides.e_pad,
                  prefetcher);
    if (centre) SubtractCentre(strides, n, centre, keys.v);
    TransposeToPanels(keys.k, n, strides.d, strides.d_pad, panels);
    if (value_panels) TransposeToPanels(keys.v, n, strides.e_pad, strides.e_pad, value_panels);
  }
};

// The near keys of the queries of one block: of the blocks around it, in the order of their rows.
template <class Acc>
struct NearKeys {
  static constexpr int kMaxBlocks = 3;
  const KeyBlock<Acc>* block[kMaxBlocks];
  int64_t column[kMaxBlocks];  // where the scores of each block begin in a row
  int count = 0;

  void Add(const KeyBlock<Acc>& added) {
    column[count] = count == 0 ? 0 : column[count - 1] + block[count - 1]->columns();
    block[count++] = &added;
  }
};

// A chunk of queries: its first row in the tensor, its first key row and its place in the block, in
// which the key of its first row is key `at`; the number of rows.
struct QueryRows {
  int64_t row, at, n;
};

PERFORMER_ISA_END
