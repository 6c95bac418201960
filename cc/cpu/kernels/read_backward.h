// Gradient of Read; features are recomputed.
//   f = 2^(a + log_mass - shift)     y = dout / den        g = y mean^T
//   delta = sum_m f g                da = f (g - delta / den)
// g uses the means less their centre (state.h), which changes neither da nor dlog_mass.
//   dq = da w      dw += da^T q      dmean += f^T y        dlog_mass += sum_i da
// delta = dout . out is taken from the features, not from the rounded output: in bfloat16 that
// rounding would be the largest part of the error.
#pragma once
#include "cpu/chunks.h"
#include "cpu/kernels/query_chunk.h"
#include "cpu/kernels/state.h"

PERFORMER_ISA_BEGIN

template <class Acc, class In>
struct ReadGradScratch {
  QueryChunk<Acc> queries;
  In *q_left, *q_right, *y_left, *y_right;             // copies for q, y as operands
  In *f_left_transposed, *g_left, *g_left_transposed;  // copies for f, g as operands
  Acc *y, *dq;                                         // [chunk][e_pad], [chunk][d_pad]
  Acc *g, *slope;                                      // [chunk][m_stride]
  Acc *mean, *mean_panels;                             // [m][e_pad], [m_panels][e_pad][kPanel]
  Acc *seen, *centre;                                  // [m_pad], [e_pad]

  void SetPointers(Arena& arena, const Map<Acc>& map, const Strides& strides, int64_t chunk) {
    for (In** x : {&q_left, &q_right}) *x = TakeOperand<Acc, In>(arena, chunk * strides.d_pad);
    for (In** x : {&y_left, &y_right}) *x = TakeOperand<Acc, In>(arena, chunk * strides.e_pad);
    for (In** x : {&f_left_transposed, &g_left, &g_left_transposed})
      *x = TakeOperand<Acc, In>(arena, chunk * strides.m_stride);
    queries.SetPointers(arena, strides, chunk);
    y = arena.Take<Acc>(chunk * strides.e_pad);
    g = arena.Take<Acc>(chunk * strides.m_stride);
    slope = map.linear() ? nullptr : arena.Take<Acc>(chunk * strides.m_stride);
    dq = arena.Take<Acc>(chunk * strides.d_pad);
    mean = arena.Take<Acc>(strides.m * strides.e_pad);
    mean_panels = arena.Take<Acc>(strides.m_panels * kPanel * strides.e_pad);
    seen = arena.Take<Acc>(strides.m_pad);
    centre = arena.Take<Acc>(strides.e_pad);
  }
};

// g = da = f (g - sum_m f g / den), and log_mass += its sum over rows.
template <class Acc>
void ReadLogitGradient(int64_t n, const Strides& strides, const Acc* den, const Acc* f, Acc* g,
                       Acc* log_mass) {
  for (int64_t i = 0; i < n; ++i, f += strides.m_stride, g += strides.m_stride) {
    Vec<Acc> sum = {};
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) sum += Load(f + m) * Load(g + m);
    const Acc delta = ReduceAdd<Acc>(sum) * Inverse(den[i]);
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
      const Vec<Acc> da = Load(f + m) * (Load(g + m) - delta);
      Store(g + m, da);
      Store(log_mass + m, Load(log_mass + m) + da);
    }
  }
}

// Rows of dq for the range, and its part of the other gradients.
template <class Acc, class In>
bool ReadGrad(const ReadGradParams& params, const Acc* projection, WorkRange range,
              ReadGradPartial<Acc> partial) {
  const Dims& dims = params.dims;
  const Strides strides = MakeStrides<Acc>(dims);
  const int64_t d_pad = strides.d_pad, e_pad = strides.e_pad;
  const int64_t m_pad = strides.m_pad, m_stride = strides.m_stride;
  const Map<Acc> map(params);
  const int64_t rows = range.end - range.begin, chunk = rows < kGradChunk ? rows : kGradChunk;
  Arena arena;
  using Operand = Operands<Acc, In>;
  ReadGradScratch<Acc, In> s;
  if (!arena.Allocate([&] { s.SetPointers(arena, map, strides, chunk); })) return false;
  const QueryHead<Acc, In> head(params, params.queries, projection, strides, range.head);
  const LoadedState<Acc> state(params.state, dims, range.sequence, range.head / GroupSize(dims));
  state.CopyMean(strides, s.mean);
  CentreOfMeans(strides, state.log_mass, s.mean, e_pad, s.seen, s.centre);
  SubtractCentre(strides, strides.m, s.centre, s.mean);
  TransposeToPanels(s.mean, strides.m, e_pad, e_pad, s.mean_panels);
  const In* mean_panels = Operand::MakePanels(s.mean_panels, strides.m_panels, e_pad);
  SetBias(state.log_mass, kLog2eDouble, head.feature_bias, strides, s.queries.bias);

  for (int64_t i = 0; i < ReadGradPartial<Acc>::Size(strides); ++i) partial.log_mass[i] = 0;
  Prefetcher prefetcher;
  const ConstRows queries = {params.queries.query, params.dtype, dims.heads, range.head, strides.d};
  const ConstRows grad_out = {params.grad_out, params.dtype, dims.heads, range.head, strides.e};
  const MutableRows grad_query = {params.grad_queries.query, params.dtype, dims.heads, range.head,
                                  strides.d};
  for (int64_t row = range.begin; row < range.end; row += chunk) {
    const int64_t n = range.end - row < chunk ? range.end - row : chunk;
    LoadRows(queries, row, n, nullptr, s.queries.q, d_pad, &prefetcher);
    LoadRows(grad_out, row, n, nullptr, s.y, e_pad, &prefetcher);
    prefetcher.Request(grad_query, row, n);

    // f, y, g and da.
    const Left<In> q = Operand::MakeLeft(s.queries.q, n, d_pad, d_pad, s.q_left);
    ComputeQueryFeatures<false>(map, q, n, head.projection, strides,
                                static_cast<const Acc*>(nullptr), s.slope, s.queries, &prefetcher);
    ScaleRows(n, e_pad, s.queries.den, s.y);
    const Left<In> y = Operand::MakeLeft(s.y, n, e_pad, e_pad, s.y_left);
    MatMulPanels(y.data, y.row_stride, n, mean_panels, Operand::Depth(e_pad), strides, s.g,
                 &prefetcher);
    ReadLogitGradient(n, strides, s.queries.den, s.queries.f, s.g, partial.log_mass);
    ChainSlope(map, n, strides, s.slope, s.g);

    // dq, dmean and dw.
    Product<false>(Operand::MakeLeft(s.g, n, m_pad, m_stride, s.g_left), head.projection.rows,
                   strides.m, s.dq, d_pad, n, d_pad, static_cast<void*>(nullptr),
                   head.projection.row_scale);
    StoreRows(grad_query, row, n, s.dq, d_pad);
    Product<true>(Operand::MakeLeftTransposed(s.queries.f, n, m_pad, m_stride, s.f_left_transposed),
                  Operand::MakeRight(s.y, n, e_pad, e_pad, s.y_right), n, partial.mean, e_pad,
                  strides.m, e_pad);
    if (params.attributes.projection_gradient)
      Product<true>(Operand::MakeLeftTransposed(s.g, n, m_pad, m_stride, s.g_left_transposed),
                    Operand::MakeRight(s.queries.q, n, d_pad, d_pad, s.q_right), n,
                    partial.projection, d_pad, strides.m, d_pad);
  }
  return true;
}

PERFORMER_ISA_END
