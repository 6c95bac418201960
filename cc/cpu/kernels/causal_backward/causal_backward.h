// Gradient of causal attention, in two scans over the sub-chunks of causal.h. For each row and head
// a normaliser (shift and den) and one delta are kept, never L x M values. p are the key features, f the query
// features; everything is relative to the anchors of the sub-chunk (key_chain.h).
//
// Forward scan, with the forward state (sum, mass) before the sub-chunk and
// cum[i] = mass + sum_{j <= i} p[j]:
//   f = 2^(a + anchor - shift)   den = sum_m f cum   y = dout / den   P = tril(y v^T)
//   g = y sum^T + P p            delta = sum_m f g   da = f (g - delta / den cum)
//   dq = da w                    dw += da^T q        shift, 1 / den and delta are kept
//
// Reverse scan, with the reverse state R = sum over later rows of f dout, and r = the same sum of
// f delta. Anchors never fall along the sequence, so that on the way back every factor
// 2^(anchor - later anchor) is at most 1. Here f = 2^(a + anchor - shift) / den is normalised.
//   db = p (v R^T - r + triu(v dout^T - delta) f)        dv = p R + triu(p f^T) dout
//   dk = db w - scale k sum_m db        dw += db^T k     then R += f^T dout, r += f^T delta
//
// Steep sub-chunks (key_chain.h) go another way (steep.h). So a chunk has only a few sub-chunks, each
// with at most one set of anchors, whatever the keys hold.
//
// Values are taken less a centre (state.h), so that what they have in common does not drown the
// differences g - delta / den cum and v R^T - r in rounding errors. The centre comes from the past:
// from the initial state or, where that is empty, from the first chunk with an unmasked key. Up to
// the end of that chunk it is the value of that key. After a steep sub-chunk it is renewed, as the
// keys of that may outweigh all before them.
//
// Products have operands of type In (packed_operands.h), but those with a triangle of pairs, apart
// from p f^T, and v R^T, which meets r in a difference.
//
// The gradient of the final state is the first reverse state. The initial state is a key that every
// row sees.
#pragma once
#include "cpu/kernels/causal_backward/forward_scan.h"
#include "cpu/kernels/causal_backward/reverse_scan.h"

PERFORMER_ISA_BEGIN

template <class Acc, class In>
bool CausalGrad(const CausalGradParams& params, const Acc* query_projection,
                const Acc* key_projection, WorkRange range, Acc* key_bias,
                CausalGradPartial<Acc> partial) {
  CausalGradient<Acc, In> gradient(params, query_projection, key_projection, range, key_bias,
                                   partial);
  if (!gradient.Start() || !ForwardScan(gradient)) return false;
  ReverseScan(gradient);
  return true;
}

PERFORMER_ISA_END
