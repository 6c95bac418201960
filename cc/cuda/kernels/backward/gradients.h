// What the launchers of all gradients share: sums of partial results, workspace of rows.
#pragma once
#include "cuda/kernels/backward/common.cuh"
#include "cuda/kernels/backward/sum_partials.cuh"
#include "cuda/kernels/forward/launch.cuh"

namespace performer {
namespace cuda {

template <class T, int W>
class Gradients : public Forward<T, W> {
 public:
  using Forward<T, W>::Forward;

 protected:
  using Operands<T>::dims_;
  using Operands<T>::launcher_;
  using Operands<T>::map_;
  static constexpr int kThreads = 256;

  // run(std::integral_constant<int, warps>): a sweep has blocks of 4 warps where their features,
  // `few`, are all, or where the GPU has no room for more; else of kMost.
  template <int kMost, class Run>
  Status ForWarps(int64_t few, Run run) const {
    if constexpr (W == 64)
      if (dims_.features <= few || launcher_.HasSmallBlocks())
        return run(std::integral_constant<int, 4>());
    return run(std::integral_constant<int, kMost>());
  }

  // to [outer][size] = sums of from [outer][terms][size].
  Status Sum(int64_t outer, int64_t terms, int64_t size, const float* from, float* to) const {
    for (;;) {
      const int64_t chunks = terms > kSumTerms ? CeilDiv(terms, kSumTerms) : 1;
      SumParams p = {from, to, outer, terms, size};
      if (chunks > 1)
        PERFORMER_RETURN_IF_ERROR(
            launcher_.Allocate(outer * chunks * size, "sums of gradients", &p.to));
      PERFORMER_RETURN_IF_ERROR(launcher_.Launch(
          "sum", SumKernel, {CeilDiv(outer * chunks * size, kThreads)}, kThreads, 0, p));
      if (chunks == 1) return Status();
      from = p.to;
      terms = chunks;
    }
  }

  // Partial results [parts, heads, size] to [count, size], where count is 1, the heads, or between:
  // each of count adds up as many neighbouring heads.
  Status SumHeads(int64_t parts, int64_t heads, int64_t count, int64_t size, const float* from,
                  void* to) const {
    if (count != heads) {
      float* sums = nullptr;
      PERFORMER_RETURN_IF_ERROR(
          launcher_.Allocate(parts * count * size, "sums of gradients", &sums));
      PERFORMER_RETURN_IF_ERROR(Sum(parts * count, heads / count, size, from, sums));
      from = sums;
    }
    return Sum(1, parts, count * size, from, static_cast<float*>(to));
  }

  // Partial results [splits, heads, size] to [N, groups, size].
  Status SumState(const Division& splits, int64_t heads, int64_t groups, int64_t size,
                  const float* from, void* to) const {
    const SumStateParams p = {from, static_cast<float*>(to), splits.tiles, heads, groups, size};
    return launcher_.Launch("sum states", SumStateKernel,
                            {CeilDiv(dims_.sequences * groups * size, kThreads)}, kThreads, 0, p);
  }

  // The gradient of key_bias [1|B, 1|G, 1|S] is made of that of each key, `each` [B, G, S] (the
  // result itself, if that is as large); nullptr where S is summed over: a bias that is common to
  // all keys moves log_mass as a whole, and its gradient is that of log_mass, `common` [N, G, M].
  // (The gradients of single keys nearly cancel in their sum.)
  Status AllocateBias(const KeySide& keys, void* result, float** each) const {
    *each = nullptr;
    if (keys.bias_length != dims_.keys) return Status();
    *each = static_cast<float*>(result);
    if (keys.bias_batch == dims_.batch && keys.bias_heads == dims_.groups) return Status();
    return launcher_.Allocate(dims_.batch * dims_.groups * dims_.keys, "the gradient of key_bias",
                              each);
  }
  Status SumBias(const KeySide& keys, const float* each, const float* common, void* to) const {
    if (each != nullptr && each == to) return Status();
    int64_t parts = dims_.batch, size = keys.bias_length;  // each: [parts, G, size]
    if (size != dims_.keys) {
      float* sums = nullptr;
      parts = dims_.sequences;
      PERFORMER_RETURN_IF_ERROR(
          launcher_.Allocate(parts * dims_.groups, "sums of gradients", &sums));
      PERFORMER_RETURN_IF_ERROR(Sum(parts * dims_.groups, dims_.features, 1, common, sums));
      each = sums;
    }
    const int64_t heads = keys.bias_heads;
    if (keys.bias_batch == 1) return SumHeads(parts, dims_.groups, heads, size, each, to);
    return Sum(parts, dims_.groups / heads, heads * size, each, static_cast<float*>(to));
  }
};

}  // namespace cuda
}  // namespace performer
