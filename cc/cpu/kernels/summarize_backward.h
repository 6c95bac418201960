// Gradient of Summarize; features are recomputed.
//   p = 2^(b - log_mass)      db = p (v dmean^T - sum_e dmean mean + dlog_mass)
// v and mean are taken less their centre (state.h) in db, which changes nothing else; but not in
// bfloat16, where v is exact and the difference is not.
//   dk = db w - scale k sum_m db      dw += db^T k      dv = p dmean      dkey_bias = sum_m db
#pragma once
#include "cpu/chunks.h"
#include "cpu/kernels/key_gradients.h"
#include "cpu/kernels/state.h"

PERFORMER_ISA_BEGIN

template <class Acc, class In>
struct SummarizeGradScratch {
  KeyChunk<Acc> keys;
  In *k_left, *k_right, *v_left;            // copies for k, v as operands
  In *p_left, *g_left, *g_left_transposed;  // copies for p, g as operands
  In* grad_mean_right;                      // copy for grad_mean as operand
  Acc *p, *g, *slope;                       // [chunk][m_stride]
  Acc *dk, *dv, *row_sum;                   // [chunk][d_pad], [chunk][e_pad], [chunk]
  Acc *grad_mean, *grad_mean_panels;        // [m][e_pad], [m_panels][e_pad][kPanel]
  Acc* anchor;                              // [m_pad]: log_mass in base 2
  Acc* column;                              // [m_pad]: sum_e dmean mean - dlog_mass
  Acc* centre;                              // [e_pad]: of v and mean

  void SetPointers(Arena& arena, const Map<Acc>& map, const Strides& strides, int64_t chunk) {
    for (In** x : {&k_left, &k_right}) *x = TakeOperand<Acc, In>(arena, chunk * strides.d_pad);
    v_left = TakeOperand<Acc, In>(arena, chunk * strides.e_pad);
    for (In** x : {&p_left, &g_left, &g_left_transposed})
      *x = TakeOperand<Acc, In>(arena, chunk * strides.m_stride);
    grad_mean_right = TakeOperand<Acc, In>(arena, (strides.m + 1) * strides.e_pad);
    keys.SetPointers(arena, strides, chunk);
    p = arena.Take<Acc>(chunk * strides.m_stride);
    g = arena.Take<Acc>(chunk * strides.m_stride);
    slope = map.linear() ? nullptr : arena.Take<Acc>(chunk * strides.m_stride);
    dk = arena.Take<Acc>(chunk * strides.d_pad);
    dv = arena.Take<Acc>(chunk * strides.e_pad);
    grad_mean = arena.Take<Acc>(strides.m * strides.e_pad);
    grad_mean_panels = arena.Take<Acc>(strides.m_panels * kPanel * strides.e_pad);
    anchor = arena.Take<Acc>(strides.m_pad);
    column = arena.Take<Acc>(strides.m_pad);
    centre = arena.Take<Acc>(strides.e_pad);
    row_sum = arena.Take<Acc>(chunk);
  }
};

// anchor, column, centre and grad_mean from the state and its gradient. A feature that saw nothing
// gets an infinite anchor, so that its p is 0.
template <class Acc, class In>
PERFORMER_INLINE void LoadStateGradient(const LoadedState<Acc>& state, const LoadedState<Acc>& grad,
                                        const Strides& strides, SummarizeGradScratch<Acc, In>& s) {
  if constexpr (std::is_same_v<In, Acc>) {
    CentreOfMeans(strides, state.log_mass, state.mean, strides.e, s.column, s.centre);
  } else {
    for (int64_t e = 0; e < strides.e_pad; ++e) s.centre[e] = 0;
  }
  for (int64_t m = 0; m < strides.m_pad; ++m) {
    const bool nothing = m >= strides.m || state.log_mass[m] == -kInf<Acc>;
    s.anchor[m] = nothing ? kInf<Acc> : static_cast<Acc>(state.Log2Mass(m));
    Acc column = nothing ? Acc(0) : -grad.log_mass[m];
    for (int64_t e = 0; e < strides.e_pad && m < strides.m; ++e) {
      const bool given = e < strides.e && !nothing;
      const Acc x = given ? grad.mean[m * strides.e + e] : Acc(0);
      s.grad_mean[m * strides.e_pad + e] = x;
      if (given) column += x * (state.mean[m * strides.e + e] - s.centre[e]);
    }
    s.column[m] = column;
  }
}

// Rows of dk, dv and dkey_bias for the range, and its part of the projection's gradient.
template <class Acc, class In>
bool SummarizeGrad(const SummarizeGradParams& params, const Acc* projection, WorkRange range,
                   Acc* key_bias, Acc* partial_projection) {
  const Dims& dims = params.dims;
  const Strides strides = MakeStrides<Acc>(dims);
  const int64_t d_pad = strides.d_pad, e_pad = strides.e_pad;
  const int64_t m_pad = strides.m_pad, m_stride = strides.m_stride;
  const Map<Acc> map(params);
  const int64_t rows = range.end - range.begin, chunk = rows < kGradChunk ? rows : kGradChunk;
  Arena arena;
  using Operand = Operands<Acc, In>;
  SummarizeGradScratch<Acc, In> s;
  if (!arena.Allocate([&] { s.SetPointers(arena, map, strides, chunk); })) return false;
  const int64_t index = KeyHeadIndex(params.keys.projection_heads, range.head);
  const auto weights = Operand::Projection(
      params.attributes, projection + index * PackedProjection<Acc>::Size(strides), strides);
  LoadStateGradient(LoadedState<Acc>(params.state, dims, range.sequence, range.head),
                    LoadedState<Acc>(params.grad_state, dims, range.sequence, range.head), strides,
                    s);
  TransposeToPanels(s.grad_mean, strides.m, e_pad, e_pad, s.grad_mean_panels);
  const In* grad_mean_panels = Operand::MakePanels(s.grad_mean_panels, strides.m_panels, e_pad);
  const Right<In> grad_mean =
      Operand::MakeRight(s.grad_mean, strides.m, e_pad, e_pad, s.grad_mean_right);

  for (int64_t i = 0; i < strides.m * d_pad; ++i) partial_projection[i] = 0;
  Prefetcher prefetcher;
  const KeyGradientRows<Acc> to(params, params.grad_keys, range, key_bias);
  for (int64_t row = range.begin; row < range.end; row += chunk) {
    const int64_t n = range.end - row < chunk ? range.end - row : chunk;
    s.keys.Load(params, params.keys, map, strides, range, row, n, &prefetcher);
    prefetcher.Request(to.key, row, n);
    prefetcher.Request(to.value, row, n);

    // p and db.
    const Left<In> k = Operand::MakeLeft(s.keys.k, n, d_pad, d_pad, s.k_left);
    MatMulPanels(k.data, k.row_stride, n, weights.panels, Operand::Depth(strides.d), strides, s.p,
                 &prefetcher, weights.feature_scale);
    ApplyMap(map, n, m_pad, m_stride, s.p, s.slope);
    KeyFeatures<Acc>(n, strides, s.keys.offset, s.anchor, s.p, nullptr);
    if constexpr (std::is_same_v<In, Acc>) SubtractCentre(strides, n, s.centre, s.keys.v);
    const Left<In> v = Operand::MakeLeft(s.keys.v, n, e_pad, e_pad, s.v_left);
    MatMulPanels(v.data, v.row_stride, n, grad_mean_panels, Operand::Depth(e_pad), strides, s.g,
                 &prefetcher);
    KeyLogitGradient(n, strides, s.keys.skip, s.column, s.p, s.g, s.row_sum);
    ChainSlope(map, n, strides, s.slope, s.g);

    // dv, dk and dw.
    Product<false>(Operand::MakeLeft(s.p, n, m_pad, m_stride, s.p_left), grad_mean, strides.m, s.dv,
                   e_pad, n, e_pad);
    Product<false>(Operand::MakeLeft(s.g, n, m_pad, m_stride, s.g_left), weights.rows, strides.m,
                   s.dk, d_pad, n, d_pad, static_cast<void*>(nullptr), weights.row_scale);
    StoreKeyGradients(to, map, strides, s.keys, s.row_sum, row, n, s.dk, s.dv);
    if (params.attributes.projection_gradient)
      Product<true>(Operand::MakeLeftTransposed(s.g, n, m_pad, m_stride, s.g_left_transposed),
                    Operand::MakeRight(s.keys.k, n, d_pad, d_pad, s.k_right), n, partial_projection,
                    d_pad, strides.m, d_pad);
  }
  return true;
}

PERFORMER_ISA_END
