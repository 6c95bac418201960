// The last steps of the gradients of keys and values, for Summarize and Causal.
#pragma once
#include "cpu/kernels/key_chunk.h"

PERFORMER_ISA_BEGIN

// Where the gradients of one key/value head go.
template <class Acc>
struct KeyGradientRows {
  MutableRows key, value;  // rows of dk and dv
  Acc* bias;               // dkey_bias in full, [B, G, S], of this head and counted from row 0

  KeyGradientRows(const Common& call, const KeyGradients& to, const WorkRange& range, Acc* key_bias)
      : key{to.key, call.dtype, call.dims.groups, range.head, call.dims.key_dim},
        value{to.value, call.dtype, call.dims.groups, range.head, call.dims.value_dim} {
    const int64_t batch = call.offsets ? 0 : range.sequence;
    bias = key_bias + (batch * call.dims.groups + range.head - batch) * call.dims.keys;
  }
};

// Stores dk, dv and dkey_bias of n keys. On entry dk holds db w; dk -= scale k sum_m db completes
// it. Masked keys get exactly 0.
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

// g[j][m] = db[j][m] = p[j][m] (g[j][m] - column[m]), and its row sums; rows of masked keys are 0.
template <class Acc>
void KeyLogitGradient(int64_t n, const Strides& strides, const uint8_t* skip, const Acc* column,
                      const Acc* p, Acc* g, Acc* row_sum) {
  for (int64_t j = 0; j < n; ++j, p += strides.m_stride, g += strides.m_stride) {
    Vec<Acc> sum = {};
    for (int64_t m = 0; m < strides.m_pad; m += kLanes<Acc>) {
      const Vec<Acc> x = skip[j] ? Vec<Acc>{} : Load(p + m) * (Load(g + m) - Load(column + m));
      Store(g + m, x);
      sum += x;
    }
    row_sum[j] = ReduceAdd<Acc>(sum);
  }
}

PERFORMER_ISA_END
