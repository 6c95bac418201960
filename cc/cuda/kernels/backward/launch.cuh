// Launchers of the gradients of Summarize and Read.
#pragma once
#include "cuda/host/operators.h"
#include "cuda/kernels/backward/center.cuh"
#include "cuda/kernels/backward/dkv.cuh"
#include "cuda/kernels/backward/dq.cuh"
#include "cuda/kernels/backward/gradients.h"
#include "cuda/kernels/backward/row_statistics.cuh"
#include "cuda/kernels/backward/value_origin.cuh"
#include "cuda/kernels/forward/prepare.cuh"

namespace performer {
namespace cuda {

// The features that a block of 4 warps holds in the kernels below.
template <class T, int W>
inline constexpr int kFeaturesOf4Warps = BackwardLayout<T, W, 4>::kFeatures;

// The origins of the values of a state's sequences and heads, [count G, W], in workspace.
template <int W>
Status LaunchValueOrigin(const Context& context, const State& state, const float** origin) {
  const Dims& dims = context.dims;
  ValueOriginParams p;
  p.log_mass = static_cast<const float*>(state.log_mass);
  p.mean = static_cast<const float*>(state.mean);
  p.features = dims.features;
  p.width = static_cast<int>(dims.value_dim);
  const int64_t matrices = state.count * dims.groups;
  PERFORMER_RETURN_IF_ERROR(
      context.launcher.Allocate(matrices * W, "the origins of values", &p.origin));
  *origin = p.origin;
  return context.launcher.Launch("origins of values", ValueOriginKernel, {matrices}, W, 0, p);
}

// Statistics and peak of all rows, in workspace. `p` has the queries, state and grad_out.
template <class T, int W>
Status LaunchRowStatistics(const Context& context, DqParams<T>* p) {
  using Layout = RowStatisticsLayout<T, W>;
  const Dims& dims = context.dims;
  Division tiles;
  PERFORMER_RETURN_IF_ERROR(context.Divide(dims.queries, Layout::kRows, &tiles));
  RowStatisticsParams<T> rows;
  static_cast<StateReadParams<T>&>(rows) = *p;
  rows.work = tiles.tiles;
  rows.grad_out = p->grad_out;
  for (float** to : {&rows.row_max, &rows.delta, &rows.peak, &rows.log_sum})
    if (to != &rows.log_sum || kKeepsLogSum<T>)
      PERFORMER_RETURN_IF_ERROR(context.launcher.Allocate(dims.batch * dims.queries * dims.heads,
                                                          "statistics of rows", to));
  p->statistics = {rows.row_max, rows.log_sum, rows.delta};
  p->peak = rows.peak;
  return context.launcher.Launch("statistics of rows", RowStatisticsKernel<T, W>,
                                 {tiles.count, dims.heads}, Layout::kThreads, Layout::kBytes, rows);
}

// Launches the dq kernel. Only blocks of narrow rows can have all features of a usual call.
template <class T, int W, int kWarps, bool kDw>
Status LaunchDqKernel(const Context& context, const Division& splits, DqParams<T>* p) {
  const Dims& dims = context.dims;
  const auto launch = [&](auto all_features) {
    constexpr bool kAllFeatures = decltype(all_features)::value;
    using Layout = DqLayout<T, W, kWarps, kAllFeatures, kDw>;
    return context.launcher.Launch("query gradient", DqKernel<T, W, kWarps, kAllFeatures, kDw>,
                                   {splits.count, dims.heads, kSlices<W>}, Layout::kThreads,
                                   Layout::kBytes, *p);
  };
  constexpr int kFeatures = BackwardLayout<T, W, kWarps>::kFeatures;
  if constexpr (W == kNarrow)
    if (dims.features <= kFeatures) return launch(std::true_type());
  PERFORMER_RETURN_IF_ERROR((LaunchRowStatistics<T, W>(context, p)));
  if (dims.features > kFeatures)
    PERFORMER_RETURN_IF_ERROR(context.launcher.Allocate(dims.batch * dims.queries * dims.heads * W,
                                                        "sums of gradients", &p->sum_query));
  return launch(std::false_type());
}

// The gradient of queries; the others as partial results.
template <class T, int W>
Status LaunchDq(const Context& context, const performer::ReadGradParams& call,
                const Division& splits, DqParams<T>* params) {
  const Dims& dims = context.dims;
  DqParams<T>& p = *params;
  const float* origin = nullptr;
  PERFORMER_RETURN_IF_ERROR((LaunchValueOrigin<W>(context, call.state, &origin)));
  PERFORMER_RETURN_IF_ERROR(
      (FillStateRead<T, W>(context, call.queries, call.state, splits, &p, origin)));
  p.grad_out = MakeRows<const T>(call.grad_out, dims.heads, dims.value_dim);
  p.grad_query = MakeRows<T>(call.grad_queries.query, dims.heads, dims.key_dim);
  const auto allocate = [&](int64_t width, float** to) {
    return context.launcher.Allocate(splits.count * dims.heads * dims.features * width,
                                     "partial gradients", to);
  };
  PERFORMER_RETURN_IF_ERROR(allocate(1, &p.part_log_mass));
  PERFORMER_RETURN_IF_ERROR(allocate(dims.value_dim, &p.part_mean));
  const bool dw = call.attributes.projection_gradient;
  if (dw) PERFORMER_RETURN_IF_ERROR(allocate(dims.key_dim, &p.part_projection));
  const auto launch = [&](auto warps) {
    constexpr int kWarps = decltype(warps)::value;
    return dw ? LaunchDqKernel<T, W, kWarps, true>(context, splits, &p)
              : LaunchDqKernel<T, W, kWarps, false>(context, splits, &p);
  };
  return WithWarps<W, kBackwardWarps<T, W>>(context, kFeaturesOf4Warps<T, W>, launch);
}

template <class T, int W>
Status ReadGrad(const Context& context, const performer::ReadGradParams& call) {
  const Dims& dims = context.dims;
  const int64_t heads = dims.heads, features = dims.features;
  Division splits;
  PERFORMER_RETURN_IF_ERROR(context.Divide(dims.queries, kSplits, &splits));
  DqParams<T> p;
  PERFORMER_RETURN_IF_ERROR((LaunchDq<T, W>(context, call, splits, &p)));
  PERFORMER_RETURN_IF_ERROR(
      SumState(context, splits, features, p.part_log_mass, call.grad_state.log_mass));
  PERFORMER_RETURN_IF_ERROR(
      SumState(context, splits, features * dims.value_dim, p.part_mean, call.grad_state.mean));
  PERFORMER_RETURN_IF_ERROR(SumProjection(context, splits.count, heads,
                                          call.queries.projection_heads, p.part_projection,
                                          call.grad_queries.projection));
  return SumHeads(context, splits.count, heads, call.queries.feature_bias_heads, features,
                  p.part_log_mass, call.grad_queries.feature_bias);
}

// The gradient of the state as an operand, and its centers, in workspace.
template <class T, int W>
Status LaunchCenter(const Context& context, const performer::SummarizeGradParams& call,
                    CenterParams<T>* params) {
  const Dims& dims = context.dims;
  CenterParams<T>& c = *params;
  c.log_mass = static_cast<const float*>(call.state.log_mass);
  c.mean = static_cast<const float*>(call.state.mean);
  c.grad_log_mass = static_cast<const float*>(call.grad_state.log_mass);
  c.grad_mean = static_cast<const float*>(call.grad_state.mean);
  c.matrices = call.state.count * dims.groups;
  c.features = dims.features;
  c.features_pad = context.features_pad;
  c.width = static_cast<int>(dims.value_dim);
  if constexpr (!kIs16Bit<T>)
    PERFORMER_RETURN_IF_ERROR((LaunchValueOrigin<W>(context, call.state, &c.origin)));
  PERFORMER_RETURN_IF_ERROR(context.launcher.Allocate(c.matrices * context.features_pad * W,
                                                      "the packed gradient of mean", &c.operand));
  for (float** to : {&c.center, &c.bias_part})
    PERFORMER_RETURN_IF_ERROR(context.launcher.Allocate(c.matrices * dims.features, "centers", to));
  if (std::is_same_v<T, Half>) {
    float* peak = nullptr;
    PERFORMER_RETURN_IF_ERROR(context.launcher.Allocate(c.matrices, "centers", &peak));
    const GradPeakParams peaks = {c.grad_log_mass, c.grad_mean, dims.features, dims.value_dim,
                                  peak};
    PERFORMER_RETURN_IF_ERROR(context.launcher.Launch("centers", GradPeakKernel, {c.matrices},
                                                      kPeakThreads, kPeakThreads / 32 * 4, peaks));
    c.peak = peak;
  }
  return context.launcher.Launch(
      "centers", CenterKernel<T, W>,
      {CeilDiv(c.matrices * context.features_pad * 32, kElementwiseThreads)}, kElementwiseThreads,
      0, c);
}

// The gradients of keys and values; the others as partial results.
template <class T, int W>
Status LaunchDkv(const Context& context, const performer::SummarizeGradParams& call,
                 const CenterParams<T>& centers, const Division& splits, DkvParams<T>* params) {
  const Dims& dims = context.dims;
  DkvParams<T>& p = *params;
  PERFORMER_RETURN_IF_ERROR((FillKeyRead<T, W>(context, call.keys, splits, &p)));
  p.log_mass = centers.log_mass;
  p.center = centers.center;
  p.origin = centers.origin;
  p.grad_mean = centers.operand;
  p.peak = centers.peak;
  p.state_count = call.state.count;
  p.grad_key = MakeRows<T>(call.grad_keys.key, dims.groups, dims.key_dim);
  p.grad_value = MakeRows<T>(call.grad_keys.value, dims.groups, dims.value_dim);
  PERFORMER_RETURN_IF_ERROR(AllocateBias(context, call.keys, call.grad_keys.bias, &p.grad_bias));
  p.bias_rows = dims.keys;
  const bool dw = call.attributes.projection_gradient;
  if (dw)
    PERFORMER_RETURN_IF_ERROR(
        context.launcher.Allocate(splits.count * dims.groups * dims.features * dims.key_dim,
                                  "partial gradients", &p.part_projection));
  const auto launch = [&](auto warps) {
    constexpr int kWarps = decltype(warps)::value;
    using Layout = DkvLayout<T, W, kWarps>;
    if (dims.features > Layout::kFeatures)
      for (float** to : {&p.sum_key, &p.sum_value})
        PERFORMER_RETURN_IF_ERROR(context.launcher.Allocate(
            dims.batch * dims.keys * dims.groups * W, "sums of gradients", to));
    return context.launcher.Launch(
        "key gradient", dw ? DkvKernel<T, W, kWarps, true> : DkvKernel<T, W, kWarps, false>,
        {splits.count, dims.groups, kSlices<W>}, Layout::kThreads, Layout::kBytes, p);
  };
  return WithWarps<W, kBackwardWarps<T, W>>(context, kFeaturesOf4Warps<T, W>, launch);
}

template <class T, int W>
Status SummarizeGrad(const Context& context, const performer::SummarizeGradParams& call) {
  const Dims& dims = context.dims;
  CenterParams<T> centers;
  PERFORMER_RETURN_IF_ERROR((LaunchCenter<T, W>(context, call, &centers)));
  Division splits;
  PERFORMER_RETURN_IF_ERROR(context.Divide(dims.keys, kSplits, &splits));
  DkvParams<T> p;
  PERFORMER_RETURN_IF_ERROR((LaunchDkv<T, W>(context, call, centers, splits, &p)));
  PERFORMER_RETURN_IF_ERROR(SumProjection(context, splits.count, dims.groups,
                                          call.keys.projection_heads, p.part_projection,
                                          call.grad_keys.projection));
  return SumBias(context, call.keys, p.grad_bias, centers.bias_part, call.grad_keys.bias);
}

template <class T>
Status RunSummarizeGrad(const performer::SummarizeGradParams& call, const Device& device) {
  const Context context(call, device);
  return WithWidth<T>(call.dims, [&](auto width) {
    return SummarizeGrad<T, decltype(width)::value>(context, call);
  });
}

template <class T>
Status RunReadGrad(const performer::ReadGradParams& call, const Device& device) {
  const Context context(call, device);
  return WithWidth<T>(
      call.dims, [&](auto width) { return ReadGrad<T, decltype(width)::value>(context, call); });
}

}  // namespace cuda
}  // namespace performer
