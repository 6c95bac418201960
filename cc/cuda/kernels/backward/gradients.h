// What the launchers of all gradients share: sums of partial results, and the gradient of key_bias.
#pragma once
#include "cuda/host/context.h"
#include "cuda/kernels/backward/sum_partials.cuh"

namespace performer {
namespace cuda {

// run(std::integral_constant<int, warps>): a kernel has blocks of 4 warps where these hold all
// features (max_features), or where the GPU has no shared memory for more; else of kMaxWarps.
template <int W, int kMaxWarps, class Run>
Status WithWarps(const Context& context, int64_t max_features, Run run) {
  if constexpr (W == 64)
    if (context.dims.features <= max_features || context.launcher.HasSmallBlocks())
      return run(std::integral_constant<int, 4>());
  return run(std::integral_constant<int, kMaxWarps>());
}

// to [outer, size] = sums of from [outer, terms, size].
inline Status Sum(const Context& context, int64_t outer, int64_t terms, int64_t size,
                  const float* from, void* to) {
  for (;;) {
    const int64_t chunks = terms > kSumTerms ? CeilDiv(terms, kSumTerms) : 1;
    SumParams p = {from, static_cast<float*>(to), outer, terms, size};
    if (chunks > 1)
      PERFORMER_RETURN_IF_ERROR(
          context.launcher.Allocate(outer * chunks * size, "sums of gradients", &p.to));
    PERFORMER_RETURN_IF_ERROR(context.launcher.Launch(
        "sum", SumKernel, {CeilDiv(outer * chunks * size, kElementwiseThreads)},
        kElementwiseThreads, 0, p));
    if (chunks == 1) return Status();
    from = p.to;
    terms = chunks;
  }
}

// Sums partial results [parts, heads, size] to [count, size]. count divides heads: each result adds
// up as many neighbouring heads.
inline Status SumHeads(const Context& context, int64_t parts, int64_t heads, int64_t count,
                       int64_t size, const float* from, void* to) {
  if (count != heads) {
    float* sums = nullptr;
    PERFORMER_RETURN_IF_ERROR(
        context.launcher.Allocate(parts * count * size, "sums of gradients", &sums));
    PERFORMER_RETURN_IF_ERROR(Sum(context, parts * count, heads / count, size, from, sums));
    from = sums;
  }
  return Sum(context, 1, parts, count * size, from, to);
}

// The gradient of projections [count, M, D] of partial results [parts, heads, M, D]; zeros where it
// is not asked for, and `from` is nullptr.
inline Status SumProjection(const Context& context, int64_t parts, int64_t heads, int64_t count,
                            const float* from, void* to) {
  const int64_t size = context.dims.features * context.dims.key_dim;
  if (from == nullptr) return Sum(context, 1, 0, count * size, nullptr, to);
  return SumHeads(context, parts, heads, count, size, from, to);
}

// Sums partial results [splits, H, size] to [N, G, size].
inline Status SumState(const Context& context, const Division& splits, int64_t size,
                       const float* from, void* to) {
  const Dims& dims = context.dims;
  const SumStateParams p = {from, static_cast<float*>(to), splits.tiles, dims.heads, dims.groups,
                            size};
  return context.launcher.Launch(
      "sum states", SumStateKernel,
      {CeilDiv(dims.sequences * dims.groups * size, kElementwiseThreads)}, kElementwiseThreads, 0,
      p);
}

// The gradient of key_bias [1|B, 1|G, 1|S] is a sum of the gradients of single keys, per_key
// [B, G, S]; or per_key is the result itself, where that is as large. Where S is summed over,
// per_key is nullptr: a bias that is common to all keys moves log_mass as a whole, and its gradient
// is that of log_mass, `common` [N, G, M]. (The gradients of single keys nearly cancel in their
// sum.)
inline Status AllocateBias(const Context& context, const KeySide& keys, void* result,
                           float** per_key) {
  const Dims& dims = context.dims;
  *per_key = nullptr;
  if (keys.bias_length != dims.keys) return Status();
  *per_key = static_cast<float*>(result);
  if (keys.bias_batch == dims.batch && keys.bias_heads == dims.groups) return Status();
  return context.launcher.Allocate(dims.batch * dims.groups * dims.keys, "the gradient of key_bias",
                                   per_key);
}

inline Status SumBias(const Context& context, const KeySide& keys, const float* per_key,
                      const float* common, void* to) {
  if (per_key != nullptr && per_key == to) return Status();
  const Dims& dims = context.dims;
  const float* terms = per_key;  // [parts, G, size]
  int64_t parts = dims.batch, size = keys.bias_length;
  if (size != dims.keys) {
    float* sums = nullptr;
    parts = dims.sequences;
    PERFORMER_RETURN_IF_ERROR(
        context.launcher.Allocate(parts * dims.groups, "sums of gradients", &sums));
    PERFORMER_RETURN_IF_ERROR(Sum(context, parts * dims.groups, dims.features, 1, common, sums));
    terms = sums;
  }
  const int64_t heads = keys.bias_heads;
  if (keys.bias_batch == 1) return SumHeads(context, parts, dims.groups, heads, size, terms, to);
  return Sum(context, parts, dims.groups / heads, heads * size, terms, to);
}

}  // namespace cuda
}  // namespace performer
