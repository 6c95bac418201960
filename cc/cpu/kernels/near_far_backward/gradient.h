// The gradient of near-and-far attention for one sequence and key/value head: its arguments and its
// scratch memory. The formulas are in near_far_backward.h.
#pragma once
#include "cpu/kernels/key_gradients.h"
#include "cpu/kernels/near_far/near_far.h"

PERFORMER_ISA_BEGIN

template <class Acc>
struct NearFarGradient : NearFarHead<Acc, NearFarGradParams> {
  using Base = NearFarHead<Acc, NearFarGradParams>;
  using Base::params, Base::dims, Base::strides, Base::blocks, Base::range;

  NearFarGradient(const NearFarGradParams& params, const Acc* query_projection,
                  const Acc* key_projection, const WorkRange& range, Acc* key_bias,
                  CausalGradPartial<Acc> partial)
      : Base(params, query_projection, key_projection, range),
        partial(partial),
        key_rows(params, params.grad_keys, range, key_bias) {}

  void SetPointers(Arena& arena) {
    Base::SetPointers(arena, true);
    queries.SetPointers(arena, strides, blocks, this->NearBlocks());
    const int64_t chunk = queries.chunk, rows = blocks.rows;
    g = arena.Take<Acc>(chunk * queries.stride);
    y = arena.Take<Acc>(chunk * strides.e_pad);
    dq = arena.Take<Acc>(chunk * strides.d_pad);
    for (Acc** row : {&lse, &chunk_delta}) *row = arena.Take<Acc>(chunk);
    column_sum = arena.Take<Acc>(queries.near_columns);
    sum_panels = arena.Take<Acc>(strides.m_panels * kPanel * strides.e_pad);
    delta = arena.Take<Acc>(rows * GroupSize(dims));
    near_dk = arena.Take<Acc>(rows * strides.d_pad);
    near_dv = arena.Take<Acc>(rows * strides.e_pad);
    near_dbias = arena.Take<Acc>(rows);
    key_chunk = blocks.MaxRows() < kNearFarChunk ? blocks.MaxRows() : kNearFarChunk;
    keys.SetPointers(arena, strides, key_chunk);
    for (Acc** x : {&p, &db}) *x = arena.Take<Acc>(key_chunk * strides.m_stride);
    dk = arena.Take<Acc>(key_chunk * strides.d_pad);
    dv = arena.Take<Acc>(key_chunk * strides.e_pad);
    row_sum = arena.Take<Acc>(key_chunk);
    for (Acc** row : {&reference, &mirrored}) *row = arena.Take<Acc>(strides.m_pad);
    centre_memory = arena.Take<Acc>(strides.e_pad);
  }
  // state = the initial state, less the centre of its means. Sets what is summed to 0.
  void Start(const SummaryPartial<Acc>& state) {
    LoadState(this->Initial(), strides, state);
    centred = Centre<Acc>(
        strides, state.mass, [&](int64_t m, int64_t e) { return state.sum[m * strides.e_pad + e]; },
        centre_memory);
    for (int64_t m = 0; m < strides.m; ++m)
      if (state.mass[m] > 0)
        SubtractCentre(strides, 1, centre_memory, state.sum + m * strides.e_pad);
    this->centre = centre_memory;
    for (int64_t i = 0; i < blocks.rows * strides.d_pad; ++i) near_dk[i] = 0;
    for (int64_t i = 0; i < blocks.rows * strides.e_pad; ++i) near_dv[i] = 0;
    for (int64_t i = 0; i < blocks.rows; ++i) near_dbias[i] = 0;
    for (int64_t i = 0; i < CausalGradPartial<Acc>::Size(strides, GroupSize(dims)); ++i)
      partial.log_mass[i] = 0;
  }
  // Where no key came before those of the block, which has been loaded, the centre becomes the
  // average of its values; these are made less the centre.
  void CentreOn(int64_t block) {
    KeyBlock<Acc>& keys = this->At(block);
    if (centred || !keys.keys.any) return;
    centred = true;
    int64_t count = 0;
    for (int64_t j = 0; j < keys.rows; ++j) count += !keys.keys.skip[j];
    for (int64_t e = 0; e < strides.e; ++e) {
      Acc sum = 0;
      for (int64_t j = 0; j < keys.rows; ++j) sum += keys.keys.v[j * strides.e_pad + e];
      const Acc average = sum / static_cast<Acc>(count);
      centre_memory[e] = average - average == 0 ? average : Acc(0);
    }
    SubtractCentre(strides, keys.rows, centre_memory, keys.keys.v);
    TransposeToPanels(keys.keys.v, keys.rows, strides.e_pad, strides.e_pad, keys.value_panels);
  }
  // The centre of a bidirectional sequence, which is to be known before states are made.
  void FindCentre() {
    for (int64_t block = blocks.count() - 1; block >= 0 && !centred; --block) {
      this->LoadBlock(block);
      CentreOn(block);
    }
  }
  // Of the rows of a chunk and query head i of the group.
  Acc* Delta(int64_t i, const QueryRows& rows) const {
    return delta + i * blocks.rows + rows.row - blocks.query_begin;
  }
  // q, y and lse of a chunk; rows that see no key get y = 0 and an infinite lse.
  void LoadQueries(const QueryRows& rows, int64_t i) {
    const int64_t head = this->FirstHead() + i;
    LoadRows(this->QueryTensor(i), rows.row, rows.n, nullptr, queries.q, strides.d_pad,
             &this->prefetcher);
    LoadRows<Acc>({params.grad_out, params.dtype, dims.heads, head, strides.e}, rows.row, rows.n,
                  nullptr, y, strides.e_pad, &this->prefetcher);
    const Acc* log_weight =
        static_cast<const Acc*>(params.log_weight) + rows.row * dims.heads + head;
    for (int64_t r = 0; r < rows.n; ++r) {
      const Acc given = log_weight[r * dims.heads];
      lse[r] = given == -kInf<Acc> ? kInf<Acc> : kLog2e<Acc> * given;
      if (given == -kInf<Acc>)
        for (int64_t e = 0; e < strides.e_pad; ++e) y[r * strides.e_pad + e] = 0;
    }
  }

  const CausalGradPartial<Acc> partial;
  const KeyGradientRows<Acc> key_rows;
  // A chunk of queries. Logits become weights; g are the gradients of logits, in rows alike.
  QueryLogits<Acc> queries;
  Acc *g, *y, *dq, *lse, *chunk_delta;
  Acc* column_sum;  // [near_columns]: sums of g over the queries of the chunk
  Acc* sum_panels;  // [m_panels][e_pad][kPanel]: the transposed sums of a state
  Acc* delta;       // [group][rows of the sequence]
  // What near queries give to the keys of the sequence: [rows][d_pad], [rows][e_pad], [rows].
  Acc *near_dk, *near_dv, *near_dbias;
  // A chunk of keys.
  KeyChunk<Acc> keys;
  Acc *p, *db, *dk, *dv, *row_sum;
  int64_t key_chunk;
  Acc *reference, *mirrored;  // [m_pad]
  Acc* centre_memory;         // [e_pad]: of `centre`
  bool centred = false;       // whether it has been set from values
};

PERFORMER_ISA_END
