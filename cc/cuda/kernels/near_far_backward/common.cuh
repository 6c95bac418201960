// What the kernels of the gradient of near-and-far attention share. The terms of a query row are
// those of one softmax over features and near keys, so that one delta serves both:
//
//   P = exp(logit - lse)      dlogit = P (grad_out . value - delta)
//   delta = sum P (grad_out . value) - grad_log_weight
//
// where the value of a feature is the mean of its far keys. lse is the row's log_weight, as given.
// exp(x - lse) = exp(x - row_max) 2^-log_sum (backward/common.cuh); what far logits are relative to
// has the query's norm in it, too. In float32 values and initial means are less an origin
// (near_far_backward/value_origin.cuh).
#pragma once
#include "cuda/kernels/backward/common.cuh"
#include "cuda/kernels/causal_backward/common.cuh"
#include "cuda/kernels/near_far/steps.cuh"

namespace performer {
namespace cuda {

// Of query rows, [rows, H], as NearFarQueryGradientKernel leaves them: what logits are relative to,
// those of near keys and those of features; the rest of both; and delta. See RowStatistics.
struct NearFarStatistics {
  float *near_max = nullptr, *far_max = nullptr, *log_sum = nullptr, *delta = nullptr;

  PERFORMER_HOST_DEVICE RowStatistics near() const { return {near_max, log_sum, delta}; }
  PERFORMER_HOST_DEVICE RowStatistics far() const { return {far_max, log_sum, delta}; }
};

// An operand of half becomes one of bfloat16: see Ranged.
template <class T>
PERFORMER_DEVICE void MakeRangedOperand(uint32_t (&x)[kFragment<T>]) {
  if constexpr (kHasRanged<T>)
#pragma unroll
    for (int i = 0; i < kFragment<T>; ++i) x[i] = Pack<Ranged<T>>(Low<T>(x[i]), High<T>(x[i]));
}
// What that rounded off, of the operand x that became `ranged`.
template <class T>
PERFORMER_DEVICE void RangedRest(uint32_t (&rest)[4], const uint32_t (&x)[4],
                                 const uint32_t (&ranged)[4]) {
  using R = Ranged<T>;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    rest[i] = Pack<R>(Low<T>(x[i]) - Low<R>(ranged[i]), High<T>(x[i]) - High<R>(ranged[i]));
}

// As SumTokens (backward/common.cuh), of 16 features and with operands in Ranged<T>.
template <class T, int W, int kColumns, int kSums>
PERFORMER_DEVICE void SumRangedTokens(float (&acc)[1][kSums][4], const BackwardTile<1, kColumns>& x,
                                      const T* tokens, int j0, int c0, int lane) {
  using R = Ranged<T>;
#pragma unroll
  for (int s = 0; s < kColumns / 16; ++s) {
    uint32_t a[kFragment<R>];
    PackA<R>(a, x[0][2 * s], x[0][2 * s + 1]);
#pragma unroll
    for (int n = 0; n < kSums / 2; ++n) {
      uint32_t b[kFragment<T>];
      LoadBTrans<T, W>(b, tokens, j0 + s * 16, c0 + n * 16, lane);
      MakeRangedOperand<T>(b);
      Mma<R>(acc[0][2 * n], acc[0][2 * n + 1], a, b);
    }
  }
}

}  // namespace cuda
}  // namespace performer
