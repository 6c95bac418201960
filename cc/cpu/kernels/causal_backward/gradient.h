// The gradient of causal attention for one sequence and key/value head: its arguments, its scratch
// memory, and the steps that both scans take. The formulas are in causal_backward.h.
#pragma once
#include "cpu/kernels/causal/key_chain.h"
#include "cpu/kernels/key_gradients.h"
#include "cpu/kernels/query_chunk.h"

PERFORMER_ISA_BEGIN

// C is the number of rows of a chunk, the largest sub-chunk.
template <class Acc>
struct CausalGradScratch {
  static constexpr int64_t C = kCausalGradChunk, kPairStride = C + kPad<Acc>;
  static_assert(C % kPad<Acc> == 0);
  KeyChunk<Acc> keys;
  QueryChunk<Acc> queries;
  // Keys: log-features of the chunk; features, running sums of features and slopes of the
  // sub-chunk.
  Acc *key_log_features, *key_features, *cumulative, *key_slope;  // [C][m_stride]
  Acc *dk, *dv, *row_sum;                                         // [C][d_pad], [C][e_pad], [C]
  // Queries of the sub-chunk.
  Acc *dq, *y;           // [C][d_pad], [C][e_pad]
  Acc *g, *query_slope;  // [C][m_stride]
  // Pairs of a query and a key.
  Acc *scores, *grad_scores;  // [C][kPairStride]
  Acc* transposed;            // [e_pad][C]: v^T in the forward scan, dout^T in the reverse scan
  Acc* f_transposed;          // [m_pad][C]
  // The forward state before the sub-chunk.
  Acc* initial_mean;   // [m][e_pad]
  Acc* sum_panels;     // [m_panels][e_pad][kPanel]: sum^T
  Acc* centre;         // [e_pad]: what values and sum / mass are less by
  Acc *mass, *anchor;  // [m_pad]; the anchor is also that of the reverse state
  Acc* raised;         // [m_pad]: anchors after a steep sub-chunk
  Acc* inverse_mass;   // [m_pad]: 1 / mass after it
  // The reverse state after the sub-chunk.
  Acc* reverse_sum;          // [m][e_pad]: R
  Acc* reverse_mass_before;  // [m_pad]: r, before the queries of the sub-chunk add to it

  // Names that the reverse scan gives to memory of the forward scan.
  Acc* grad_key_logits;  // [C][m_stride], over key_log_features: db
  Acc* reverse_mass;     // [m_pad], over mass: r
  Acc* reverse_panels;   // [m_panels][e_pad][kPanel], over sum_panels: R^T
  Acc* padded_delta;     // [C], over queries.shift: delta of a row, 0 behind the last row
  Acc* steep_keys;       // [C][m_stride], over g: log-features of the keys of a steep sub-chunk

  void SetPointers(Arena& arena, const Map<Acc>& map, const Strides& strides) {
    keys.SetPointers(arena, strides, C);
    queries.SetPointers(arena, strides, C);
    for (Acc** rows : {&key_log_features, &key_features, &cumulative, &g})
      *rows = arena.Take<Acc>(C * strides.m_stride);
    for (Acc** rows : {&key_slope, &query_slope})
      *rows = map.linear() ? nullptr : arena.Take<Acc>(C * strides.m_stride);
    for (Acc** rows : {&dq, &dk}) *rows = arena.Take<Acc>(C * strides.d_pad);
    for (Acc** rows : {&y, &dv}) *rows = arena.Take<Acc>(C * strides.e_pad);
    transposed = arena.Take<Acc>(strides.e_pad * C);
    f_transposed = arena.Take<Acc>(strides.m_pad * C);
    for (Acc** pairs : {&grad_scores, &scores}) *pairs = arena.Take<Acc>(C * kPairStride);
    row_sum = arena.Take<Acc>(C);
    sum_panels = arena.Take<Acc>(strides.m_panels * kPanel * strides.e_pad);
    for (Acc** sum : {&reverse_sum, &initial_mean})
      *sum = arena.Take<Acc>(strides.m * strides.e_pad);
    centre = arena.Take<Acc>(strides.e_pad);
    for (Acc** row : {&mass, &anchor, &raised, &inverse_mass, &reverse_mass_before})
      *row = arena.Take<Acc>(strides.m_pad);
    grad_key_logits = key_log_features;
    reverse_mass = mass;
    reverse_panels = sum_panels;
    padded_delta = queries.shift;
    steep_keys = g;
  }
};

// A sub-chunk of the forward scan.
struct GradSubChunk {
  int64_t row, chunk_begin;  // its first row in the tensor, and in its chunk
  int64_t rows;              // number of rows
  int64_t anchors;           // index of the set of anchors before it
  int64_t centre;            // index of the centre of its values
  bool steep;                // as in CausalSubChunk
};

template <class Acc, class In>
struct CausalGradient {
  using Scratch = CausalGradScratch<Acc>;
  using Operand = Operands<Acc, In>;
  static constexpr int64_t C = Scratch::C, kPairStride = Scratch::kPairStride;

  CausalGradient(const CausalGradParams& params, const Acc* query_projection,
                 const Acc* key_projection, const WorkRange& range, Acc* key_bias,
                 CausalGradPartial<Acc> partial)
      : params(params),
        dims(params.dims),
        strides(MakeStrides<Acc>(params.dims)),
        map(params),
        query_projection(query_projection),
        key_projection(Operands<Acc, In>::Projection(
            params.attributes,
            CausalProjection<Acc, In>::OperandsAt(
                key_projection + KeyHeadIndex(params.keys.projection_heads, range.head) *
                                     PackedProjection<Acc>::Size(strides),
                strides),
            strides)),
        range(range),
        partial(partial),
        key_rows(params, params.grad_keys, range, key_bias),
        initial(params.initial, params.dims, range.sequence, range.head) {}

  // Sets the scratch memory, and the partial results to 0; false if there is no memory.
  bool Start() {
    const bool allocated = arena.Allocate([&] {
      s.SetPointers(arena, map, strides);
      const int64_t width = strides.m_stride + strides.d_pad + strides.e_pad;
      left = TakeOperand<Acc, In>(arena, C * width);
      right = TakeOperand<Acc, In>(arena, C * width + strides.m_panels * kPanel * strides.e_pad);
    });
    if (!allocated) return false;
    const int64_t rows = range.end - range.begin;
    shift = row_values.Append(2 * rows * GroupSize(dims));
    delta = deltas.Append(rows * GroupSize(dims));
    if ((shift == nullptr || delta == nullptr) && rows > 0) return false;
    inverse = shift + rows * GroupSize(dims);
    for (int64_t i = 0; i < CausalGradPartial<Acc>::Size(strides, GroupSize(dims)); ++i)
      partial.log_mass[i] = 0;
    return true;
  }

  int64_t FirstHead() const { return range.head * GroupSize(dims); }
  // Of shift, inverse or delta: the values of query head i of the group from tensor row `row` on.
  template <class T>
  T* OfHead(T* values, int64_t i, int64_t row) const {
    return values + i * (range.end - range.begin) + row - range.begin;
  }
  QueryHead<Acc, In> Head(int64_t i) const {
    return {params, params.queries,
            CausalProjection<Acc, In>::OperandsAt(query_projection, strides), strides,
            FirstHead() + i};
  }
  QueryHead<Acc> SteepHead(int64_t i) const {
    return {params, params.queries, query_projection, strides, FirstHead() + i};
  }

  // Operands of products, x [n][width], each until the next one of its side.
  Left<In> AsLeft(const Acc* x, int64_t n, int64_t width, int64_t stride) {
    return Operand::MakeLeft(x, n, width, stride, left);
  }
  Left<In> AsLeftTransposed(const Acc* x, int64_t n, int64_t width, int64_t stride) {
    return Operand::MakeLeftTransposed(x, n, width, stride, left);
  }
  Right<In> AsRight(const Acc* x, int64_t n, int64_t width, int64_t stride) {
    return Operand::MakeRight(x, n, width, stride, right);
  }
  // Panels [m_panels][width][kPanel] as right operand.
  const In* AsPanels(const Acc* panels, int64_t width) {
    if constexpr (std::is_same_v<In, Acc>) {
      return panels;
    } else {
      for (int64_t p = 0; p < strides.m_panels; ++p)
        Operand::MakeRight(panels + p * width * kPanel, width, kPanel, kPanel,
                           right + p * Operand::Depth(width) * kPanel);
      return right;
    }
  }
  // f^T of n queries as right operand, [Depth(m)][C].
  const In* TransposeQueryFeatures(int64_t n) {
    if constexpr (std::is_same_v<In, Acc>) {
      TransposeRows(s.queries.f, strides.m_stride, n, strides.m_pad, s.f_transposed);
      return s.f_transposed;
    } else {
      const Left<In> f = Operand::MakeLeft(s.queries.f, n, strides.m_pad, strides.m_stride, right);
      In* to = reinterpret_cast<In*>(s.f_transposed);
      Transpose(f.data, f.row_stride, RoundUp(n, 4), Operand::Depth(strides.m_pad), to, C);
      return to;
    }
  }
  // x = log-features of n rows, without biases.
  void LogFeaturesOf(const Acc* rows, int64_t n, const ProjectionOperands<Acc, In>& projection,
                     Acc* x, Acc* slope) {
    const Left<In> operand = AsLeft(rows, n, strides.d_pad, strides.d_pad);
    MatMulPanels(operand.data, operand.row_stride, n, projection.panels, Operand::Depth(strides.d),
                 strides, x, &prefetcher, projection.feature_scale);
    ApplyMap(map, n, strides.m_pad, strides.m_stride, x, slope);
  }
  // to = g w for gradients g [n][m_stride] of logits, and sum [m][d_pad] += g^T rows, the
  // gradient of the projection.
  void LogitProducts(const Acc* g, int64_t n, const ProjectionOperands<Acc, In>& projection,
                     const Acc* rows, Acc* to, Acc* sum) {
    const int64_t d_pad = strides.d_pad, stride = strides.m_stride;
    Product<false>(AsLeft(g, n, strides.m_pad, stride), projection.rows, strides.m, to, d_pad, n,
                   d_pad, static_cast<void*>(nullptr), projection.row_scale);
    if (!params.attributes.projection_gradient) return;
    Product<true>(AsLeftTransposed(g, n, strides.m_pad, stride), AsRight(rows, n, d_pad, d_pad), n,
                  sum, d_pad, strides.m, d_pad);
  }
  const Acc* Values(const GradSubChunk& sub_chunk) const {
    return s.keys.v + sub_chunk.chunk_begin * strides.e_pad;
  }

  // Appends s.centre as a new one; false if there is no memory.
  bool SaveCentre() {
    ++last_centre;
    if (strides.e_pad == 0) return true;
    Acc* to = centres.Append(strides.e_pad);
    if (to != nullptr) Copy(s.centre, strides.e_pad, to);
    return to != nullptr;
  }

  // Values less the centre, of keys that have been loaded.
  void LoadValues(int64_t row, int64_t n) {
    LoadRows<Acc>(KeyChunk<Acc>::Values(params, params.keys, range), row, n, s.keys.skip, s.keys.v,
                  strides.e_pad, &prefetcher);
    SubtractCentre(strides, n, s.centre, s.keys.v);
  }

  // Values less the centre, and log-features of the keys of a chunk, with offsets.
  void LoadKeys(int64_t row, int64_t n) {
    s.keys.Load(params, params.keys, map, strides, range, row, n, &prefetcher);
    SubtractCentre(strides, n, s.centre, s.keys.v);
    LogFeaturesOf(s.keys.k, n, key_projection, s.key_log_features, s.key_slope);
    for (int64_t j = 0; j < n; ++j) {
      const int64_t first = j * strides.m_stride;
      for (int64_t m = first; m < first + strides.m_pad; m += kLanes<Acc>)
        Store(s.key_log_features + m, Load(s.key_log_features + m) + s.keys.offset[j]);
    }
  }

  // Features of the keys of the sub-chunk and their running sums, from row 0 of these buffers on.
  void ComputeKeyFeatures(const GradSubChunk& sub_chunk) {
    if (sub_chunk.steep) {
      ComputeKeyFeaturesWith(sub_chunk, [](Vec<Acc> x) { return Exp2Normal<Acc>(x); });
    } else {
      ComputeKeyFeaturesWith(sub_chunk, [](Vec<Acc> x) { return Exp2(x); });
    }
  }
  template <class Power>
  PERFORMER_INLINE void ComputeKeyFeaturesWith(const GradSubChunk& sub_chunk, Power power) {
    const int64_t first = sub_chunk.chunk_begin * strides.m_stride;
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
      const Vec<Acc> given = Load(s.anchor + m), zero = {};
      const Vec<Acc> anchor = given == -kInf<Acc> ? zero : given;
      Vec<Acc> sum = Load(s.mass + m);
      for (int64_t j = 0; j < sub_chunk.rows; ++j) {
        const int64_t at = j * strides.m_stride + m;
        const Vec<Acc> feature = power(Load(s.key_log_features + first + at) - anchor);
        sum += feature;
        Store(s.key_features + at, feature);
        Store(s.cumulative + at, sum);
      }
    }
  }

  // Queries of head i of the group in q, their output gradients in y.
  void LoadQueries(const GradSubChunk& sub_chunk, int64_t i) {
    const int64_t head = FirstHead() + i;
    LoadRows<Acc>({params.queries.query, params.dtype, dims.heads, head, strides.d}, sub_chunk.row,
                  sub_chunk.rows, nullptr, s.queries.q, strides.d_pad, &prefetcher);
    LoadRows<Acc>({params.grad_out, params.dtype, dims.heads, head, strides.e}, sub_chunk.row,
                  sub_chunk.rows, nullptr, s.y, strides.e_pad, &prefetcher);
  }

  // to[cols][C] = from[n][cols]^T, zero in the columns from n on.
  static void TransposeRows(const Acc* from, int64_t stride, int64_t n, int64_t cols, Acc* to) {
    const int64_t whole = n / 4 * 4;
    Transpose(from, stride, whole, cols, to, C);
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t r = whole; r < C; ++r) to[c * C + r] = r < n ? from[r * stride + c] : Acc(0);
  }

  const CausalGradParams& params;
  const Dims& dims;
  const Strides strides;
  const Map<Acc> map;
  const Acc* query_projection;  // [projection_heads][PackedProjection::Size]
  const ProjectionOperands<Acc, In> key_projection;
  const WorkRange range;
  const CausalGradPartial<Acc> partial;
  const KeyGradientRows<Acc> key_rows;
  const LoadedState<Acc> initial;
  Arena arena;
  Scratch s;
  In *left, *right;  // copies of operands
  Prefetcher prefetcher;
  GrowingArray<GradSubChunk> sub_chunks;
  GrowingArray<Acc> anchors;  // [sets][m_pad], a new set only when an anchor changed
  GrowingArray<Acc> row_values;
  GrowingArray<double> deltas;
  // Where values get their centre from: nothing yet, their first key, or a state.
  enum class Centred { kNot, kByFirstKey, kByState } centred = Centred::kNot;
  GrowingArray<Acc> centres;  // [sets][e_pad], a new one only when the centre changed
  int64_t last_centre = -1, centre_in_force = 0;  // indices; the latter in the reverse scan
  // Of each row, [heads of the group][rows]: the maximum that its log-features are less by, in base
  // 2, and 1 / den relative to it, 0 where it sees no key. Their sum as one logarithm would be
  // rounded: of keys with entries of 1e4 it is about 1e9.
  Acc *shift = nullptr, *inverse = nullptr;
  // grad_out . out of each row, likewise. In double: where one key outweighs all others by far, it is
  // exactly what that key's product with grad_out is, and the two meet in a difference.
  double* delta = nullptr;
};

PERFORMER_ISA_END
