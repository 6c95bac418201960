// Gradients of Summarize and Read; features are recomputed.
//   read:       f = 2^(a + log_mass - shift), y = dout / den, g = y mean^T, delta = sum_m f g, da =
//   f (g - delta / den)
//               dq = da w, dw += da^T q, dmean += f^T y, dlog_mass += sum_i da
//   summarize:  p = 2^(b - log_mass), db = p (v dmean^T - sum_e dmean mean + dlog_mass)
//               dk = db w - scale k sum_m db, dw += db^T k, dv = p dmean, dkey_bias = sum_m db
// delta = dout . out is taken from the features, not from the rounded output: in bfloat16 that is
// the largest part of the error.
#pragma once
#include "core/splits.h"
#include "cpu/kernels/read.h"

PERFORMER_ISA_BEGIN

template <class Acc, class In>
struct ReadGradScratch {
  Acc *q, *y, *f, *g, *slope, *dq, *mean, *panels, *bias, *row_max, *shift, *den;
  In *q_rows, *q_stack, *y_rows, *y_stack, *f_columns, *g_rows, *g_columns;  // operands

  void Place(Arena& arena, const Map<Acc>& map, const Strides& strides, int64_t chunk) {
    const auto take = [&](int64_t width) {
      return arena.Take<In>(Operands<Acc, In>::Size(chunk * width));
    };
    for (In** x : {&q_rows, &q_stack}) *x = take(strides.d_pad);
    for (In** x : {&y_rows, &y_stack}) *x = take(strides.e_pad);
    for (In** x : {&f_columns, &g_rows, &g_columns}) *x = take(strides.m_stride);
    q = arena.Take<Acc>(chunk * strides.d_pad);
    y = arena.Take<Acc>(chunk * strides.e_pad);
    f = arena.Take<Acc>(chunk * strides.m_stride);
    g = arena.Take<Acc>(chunk * strides.m_stride);
    slope = map.linear() ? nullptr : arena.Take<Acc>(chunk * strides.m_stride);
    dq = arena.Take<Acc>(chunk * strides.d_pad);
    mean = arena.Take<Acc>(strides.m * strides.e_pad);
    panels = arena.Take<Acc>(strides.m_panels * kPanel * strides.e_pad);
    bias = arena.Take<Acc>(strides.m_pad);
    row_max = arena.Take<Acc>(chunk * kLanes<Acc>);
    shift = arena.Take<Acc>(chunk);
    den = arena.Take<Acc>(chunk);
  }
};

// g = f (g - sum_m f g / den), and log_mass += sum over rows.
template <class Acc>
void ReadLogitGradient(int64_t n, const Strides& strides, const Acc* den, const Acc* f, Acc* g,
                       Acc* log_mass) {
  for (int64_t i = 0; i < n; ++i, f += strides.m_stride, g += strides.m_stride) {
    Vec<Acc> sum = {};
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) sum += Load(f + m) * Load(g + m);
    const Acc delta = ReduceAdd<Acc>(sum) * Inverse(den[i]);
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
      const Vec<Acc> x = Load(f + m) * (Load(g + m) - delta);
      Store(g + m, x);
      Store(log_mass + m, Load(log_mass + m) + x);
    }
  }
}

template <class Acc, class In>
bool ReadGrad(const ReadGradParams& params, const Acc* projection, WorkRange range,
              ReadGradPartial<Acc> partial) {
  const Dims& dims = params.dims;
  const Strides strides = MakeStrides<Acc>(dims);
  const Map<Acc> map(params);
  const int64_t rows = range.end - range.begin, chunk = rows < kGradChunk ? rows : kGradChunk;
  Arena arena;
  using Operand = Operands<Acc, In>;
  ReadGradScratch<Acc, In> s;
  s.Place(arena, map, strides, chunk);
  if (!arena.Allocate()) return false;
  s.Place(arena, map, strides, chunk);
  const QueryHead<Acc, In> head(params, params.queries, projection, strides, range.head);
  const LoadedState<Acc> state(params.state, dims, range.sequence, range.head / GroupSize(dims));
  state.CopyMean(strides, s.mean);
  TransposeToPanels(s.mean, strides.m, strides.e_pad, strides.e_pad, s.panels);
  const In* panels = Operand::Panels(s.panels, strides.m_panels, strides.e_pad);
  SetBias(state.log_mass, kLog2eDouble, head.feature_bias, strides, s.bias);

  for (int64_t i = 0; i < ReadGradPartial<Acc>::Size(strides); ++i) partial.log_mass[i] = 0;
  Prefetcher prefetcher;
  const ConstRows queries = {params.queries.query, params.dtype, dims.heads, range.head, strides.d};
  const ConstRows grad_out = {params.grad_out, params.dtype, dims.heads, range.head, strides.e};
  const MutableRows grad_query = {params.grad_queries.query, params.dtype, dims.heads, range.head,
                                  strides.d};
  for (int64_t row = range.begin; row < range.end; row += chunk) {
    const int64_t n = range.end - row < chunk ? range.end - row : chunk;
    LoadRows(queries, row, n, nullptr, s.q, strides.d_pad, &prefetcher);
    LoadRows(grad_out, row, n, nullptr, s.y, strides.e_pad, &prefetcher);
    prefetcher.Request(grad_query, row, n);
    QueryLogFeatures(map, Operand::Rows(s.q, n, strides.d_pad, strides.d_pad, s.q_rows), n,
                     head.projection, strides, s.bias, s.f, s.slope, s.row_max, &prefetcher);
    QueryFeatures<false, Acc>(n, strides, s.bias, nullptr, s.row_max, s.f, s.shift, s.den);
    ScaleRows(n, strides.e_pad, s.den, s.y);
    const Left<In> y = Operand::Rows(s.y, n, strides.e_pad, strides.e_pad, s.y_rows);
    MatMulPanels(y.at, y.row, n, panels, Operand::Depth(strides.e_pad), strides, s.g, &prefetcher);
    ReadLogitGradient(n, strides, s.den, s.f, s.g, partial.log_mass);
    ChainSlope(map, n, strides, s.slope, s.g);
    Product<false>(Operand::Rows(s.g, n, strides.m_pad, strides.m_stride, s.g_rows),
                   head.projection.rows, strides.m, s.dq, strides.d_pad, n, strides.d_pad,
                   static_cast<void*>(nullptr), head.projection.row_scale);
    StoreRows(grad_query, row, n, s.dq, strides.d_pad);
    Product<true>(Operand::Columns(s.f, n, strides.m_pad, strides.m_stride, s.f_columns),
                  Operand::Stack(s.y, n, strides.e_pad, strides.e_pad, s.y_stack), n, partial.mean,
                  strides.e_pad, strides.m, strides.e_pad);
    Product<true>(Operand::Columns(s.g, n, strides.m_pad, strides.m_stride, s.g_columns),
                  Operand::Stack(s.q, n, strides.d_pad, strides.d_pad, s.q_stack), n,
                  partial.projection, strides.d_pad, strides.m, strides.d_pad);
  }
  return true;
}

// Where the gradients of one key/value head go: rows of dk and dv, and the log weights' gradient
// [B, G, S].
template <class Acc>
struct KeyGradientRows {
  MutableRows key, value;
  Acc* bias;  // of the tensor's row 0

  KeyGradientRows(const Common& call, const KeyGradients& to, const WorkRange& range, Acc* key_bias)
      : key{to.key, call.dtype, call.dims.groups, range.head, call.dims.key_dim},
        value{to.value, call.dtype, call.dims.groups, range.head, call.dims.value_dim} {
    const int64_t batch = call.offsets ? 0 : range.sequence;
    bias = key_bias + (batch * call.dims.groups + range.head - batch) * call.dims.keys;
  }
};

// From db in g, with its row sums: dk, into the scratch rows `dk` and the tensors. Masked keys get
// exactly 0.
template <class Acc>
void StoreKeyGradients(const KeyGradientRows<Acc>& to, const Map<Acc>& map, const Strides& strides,
                       const KeyChunk<Acc>& keys, const Acc* row_sum, int64_t row, int64_t n,
                       Acc* dk, Acc* dv) {
  for (int64_t j = 0; j < n; ++j) {
    const Acc norm = map.key_norm ? map.scale * row_sum[j] : Acc(0);
    for (int64_t d = 0; d < strides.d_pad; ++d)
      dk[j * strides.d_pad + d] =
          keys.skip[j] ? 0 : dk[j * strides.d_pad + d] - norm * keys.k[j * strides.d_pad + d];
    if (keys.skip[j])
      for (int64_t e = 0; e < strides.e_pad; ++e) dv[j * strides.e_pad + e] = 0;
    to.bias[row + j] = keys.skip[j] ? 0 : row_sum[j];
  }
  StoreRows(to.key, row, n, dk, strides.d_pad);
  StoreRows(to.value, row, n, dv, strides.e_pad);
}

// g[j][m] = f[j][m] (g[j][m] - column[m]) with its row sums; rows of masked keys are 0.
template <class Acc>
void KeyLogitGradient(int64_t n, const Strides& strides, const uint8_t* skip, const Acc* column,
                      const Acc* f, Acc* g, Acc* row_sum) {
  for (int64_t j = 0; j < n; ++j, f += strides.m_stride, g += strides.m_stride) {
    Vec<Acc> sum = {};
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
      const Vec<Acc> x = skip[j] ? Vec<Acc>{} : Load(f + m) * (Load(g + m) - Load(column + m));
      Store(g + m, x);
      sum += x;
    }
    row_sum[j] = ReduceAdd<Acc>(sum);
  }
}

template <class Acc, class In>
struct SummarizeGradScratch {
  KeyChunk<Acc> keys;
  Acc *f, *g, *slope, *dk, *dv, *grad_mean, *panels, *anchor, *column, *row_sum;
  In *k_rows, *k_stack, *v_rows, *f_rows, *g_rows, *g_columns, *mean_stack;  // operands

  void Place(Arena& arena, const Map<Acc>& map, const Strides& strides, int64_t chunk) {
    const auto take = [&](int64_t numbers) {
      return arena.Take<In>(Operands<Acc, In>::Size(numbers));
    };
    for (In** x : {&k_rows, &k_stack}) *x = take(chunk * strides.d_pad);
    v_rows = take(chunk * strides.e_pad);
    for (In** x : {&f_rows, &g_rows, &g_columns}) *x = take(chunk * strides.m_stride);
    mean_stack = take((strides.m + 1) * strides.e_pad);
    keys.Place(arena, strides, chunk);
    f = arena.Take<Acc>(chunk * strides.m_stride);
    g = arena.Take<Acc>(chunk * strides.m_stride);
    slope = map.linear() ? nullptr : arena.Take<Acc>(chunk * strides.m_stride);
    dk = arena.Take<Acc>(chunk * strides.d_pad);
    dv = arena.Take<Acc>(chunk * strides.e_pad);
    grad_mean = arena.Take<Acc>(strides.m * strides.e_pad);
    panels = arena.Take<Acc>(strides.m_panels * kPanel * strides.e_pad);
    anchor = arena.Take<Acc>(strides.m_pad);
    column = arena.Take<Acc>(strides.m_pad);
    row_sum = arena.Take<Acc>(chunk);
  }
};

template <class Acc, class In>
bool SummarizeGrad(const SummarizeGradParams& params, const Acc* projection, WorkRange range,
                   Acc* key_bias, Acc* partial_projection) {
  const Dims& dims = params.dims;
  const Strides strides = MakeStrides<Acc>(dims);
  const Map<Acc> map(params);
  const int64_t rows = range.end - range.begin, chunk = rows < kGradChunk ? rows : kGradChunk;
  Arena arena;
  using Operand = Operands<Acc, In>;
  SummarizeGradScratch<Acc, In> s;
  s.Place(arena, map, strides, chunk);
  if (!arena.Allocate()) return false;
  s.Place(arena, map, strides, chunk);
  const int64_t index = params.keys.projection_heads == 1 ? 0 : range.head;
  const auto weights = Operand::Projection(
      params.attributes, projection + index * PackedProjection<Acc>::Size(strides), strides);

  const LoadedState<Acc> state(params.state, dims, range.sequence, range.head);
  const LoadedState<Acc> grad(params.grad_state, dims, range.sequence, range.head);
  for (int64_t m = 0; m < strides.m_pad; ++m) {
    const bool nothing = m >= strides.m || state.log_mass[m] == -kInf<Acc>;
    s.anchor[m] =
        nothing ? kInf<Acc>
                : state.log_mass[m] * kLog2e<Acc>;  // weights of a feature that saw nothing are 0
    Acc column = nothing ? Acc(0) : -grad.log_mass[m];
    for (int64_t e = 0; e < strides.e_pad && m < strides.m; ++e) {
      const Acc x = e < strides.e && !nothing ? grad.mean[m * strides.e + e] : Acc(0);
      s.grad_mean[m * strides.e_pad + e] = x;
      if (e < strides.e && !nothing) column += x * state.mean[m * strides.e + e];
    }
    s.column[m] = column;
  }
  TransposeToPanels(s.grad_mean, strides.m, strides.e_pad, strides.e_pad, s.panels);
  const In* panels = Operand::Panels(s.panels, strides.m_panels, strides.e_pad);
  const Right<In> grad_mean =
      Operand::Stack(s.grad_mean, strides.m, strides.e_pad, strides.e_pad, s.mean_stack);

  for (int64_t i = 0; i < strides.m * strides.d_pad; ++i) partial_projection[i] = 0;
  Prefetcher prefetcher;
  const KeyGradientRows<Acc> to(params, params.grad_keys, range, key_bias);
  for (int64_t row = range.begin; row < range.end; row += chunk) {
    const int64_t n = range.end - row < chunk ? range.end - row : chunk;
    s.keys.Load(params, params.keys, map, strides, range, row, n, &prefetcher);
    prefetcher.Request(to.key, row, n);
    prefetcher.Request(to.value, row, n);
    const Left<In> k = Operand::Rows(s.keys.k, n, strides.d_pad, strides.d_pad, s.k_rows);
    MatMulPanels(k.at, k.row, n, weights.panels, Operand::Depth(strides.d), strides, s.f,
                 &prefetcher, weights.feature_scale);
    ApplyMap(map, n, strides.m_pad, strides.m_stride, s.f, s.slope);
    KeyFeatures<Acc>(n, strides, s.keys.offset, s.anchor, s.f, nullptr);
    const Left<In> v = Operand::Rows(s.keys.v, n, strides.e_pad, strides.e_pad, s.v_rows);
    MatMulPanels(v.at, v.row, n, panels, Operand::Depth(strides.e_pad), strides, s.g, &prefetcher);
    KeyLogitGradient(n, strides, s.keys.skip, s.column, s.f, s.g, s.row_sum);
    ChainSlope(map, n, strides, s.slope, s.g);
    Product<false>(Operand::Rows(s.f, n, strides.m_pad, strides.m_stride, s.f_rows), grad_mean,
                   strides.m, s.dv, strides.e_pad, n, strides.e_pad);
    Product<false>(Operand::Rows(s.g, n, strides.m_pad, strides.m_stride, s.g_rows), weights.rows,
                   strides.m, s.dk, strides.d_pad, n, strides.d_pad, static_cast<void*>(nullptr),
                   weights.row_scale);
    StoreKeyGradients(to, map, strides, s.keys, s.row_sum, row, n, s.dk, s.dv);
    Product<true>(Operand::Columns(s.g, n, strides.m_pad, strides.m_stride, s.g_columns),
                  Operand::Stack(s.keys.k, n, strides.d_pad, strides.d_pad, s.k_stack), n,
                  partial_projection, strides.d_pad, strides.m, strides.d_pad);
  }
  return true;
}

PERFORMER_ISA_END
