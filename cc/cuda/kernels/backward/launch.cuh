// Launchers of the gradients of Summarize and Read.
#pragma once
#include "cuda/kernels/backward/center.cuh"
#include "cuda/kernels/backward/dkv.cuh"
#include "cuda/kernels/backward/dq.cuh"
#include "cuda/kernels/backward/gradients.h"
#include "cuda/kernels/backward/row_statistics.cuh"

namespace performer {
namespace cuda {

template <class T, int W>
class BidirectionalGrad : public Gradients<T, W> {
 public:
  using Gradients<T, W>::Gradients;

  Status Read(const performer::ReadGradParams& call) const {
    const int64_t features = dims_.features, heads = dims_.heads;
    const int64_t rows = dims_.batch * dims_.queries;
    Division tiles, splits;
    PERFORMER_RETURN_IF_ERROR(
        this->Divide(dims_.queries, RowStatisticsLayout<T, W>::kRows, &tiles));
    PERFORMER_RETURN_IF_ERROR(this->Divide(dims_.queries, kSplits, &splits));

    RowStatisticsParams<T> r;
    PERFORMER_RETURN_IF_ERROR(this->template PackProjection<W>(
        call.queries.projection, call.queries.projection_heads, &r.projection));
    r.log_mass = static_cast<const float*>(call.state.log_mass);
    PERFORMER_RETURN_IF_ERROR(this->template Pack<W>("the packed mean", call.state.mean, r.log_mass,
                                                     call.state.count * dims_.groups,
                                                     dims_.value_dim, &r.mean));
    for (float** to : {&r.lse, &r.delta, &r.peak})
      PERFORMER_RETURN_IF_ERROR(launcher_.Allocate(rows * heads, "statistics of rows", to));
    r.query = InputRows<T>(call.queries.query, heads, dims_.key_dim);
    r.grad_out = InputRows<T>(call.grad_out, heads, dims_.value_dim);
    r.feature_bias = static_cast<const float*>(call.queries.feature_bias);
    r.feature_bias_heads = call.queries.feature_bias_heads;
    r.state_count = call.state.count;
    r.map = map_;
    r.tiles = tiles.tiles;
    r.groups = dims_.groups;
    r.features = features;
    r.features_pad = this->features_pad_;
    using Statistics = RowStatisticsLayout<T, W>;
    PERFORMER_RETURN_IF_ERROR(launcher_.Launch("statistics of rows", RowStatisticsKernel<T, W>,
                                               {tiles.count, heads}, Statistics::kThreads,
                                               Statistics::kBytes, r));

    DqParams<T> p;
    p.query = r.query;
    p.grad_out = r.grad_out;
    p.projection = r.projection;
    p.feature_bias = r.feature_bias;
    p.feature_bias_heads = r.feature_bias_heads;
    p.mean = r.mean;
    p.log_mass = r.log_mass;
    p.state_count = r.state_count;
    p.map = map_;
    p.splits = splits.tiles;
    p.groups = dims_.groups;
    p.features = features;
    p.features_pad = this->features_pad_;
    p.lse = r.lse;
    p.delta = r.delta;
    p.peak = r.peak;
    p.grad_query = OutputRows<T>(call.grad_queries.query, heads, dims_.key_dim);
    const int64_t parts = splits.count * heads * features;
    PERFORMER_RETURN_IF_ERROR(launcher_.Allocate(parts, "partial gradients", &p.part_log_mass));
    PERFORMER_RETURN_IF_ERROR(
        launcher_.Allocate(parts * dims_.value_dim, "partial gradients", &p.part_mean));
    PERFORMER_RETURN_IF_ERROR(
        launcher_.Allocate(parts * dims_.key_dim, "partial gradients", &p.part_projection));
    PERFORMER_RETURN_IF_ERROR(this->template ForWarps<kWarps>(kFew, [&](auto warps) {
      using Layout = DqLayout<T, W, decltype(warps)::value>;
      if (features > Layout::kFeatures)
        PERFORMER_RETURN_IF_ERROR(
            launcher_.Allocate(rows * heads * W, "sums of gradients", &p.sum_query));
      return launcher_.Launch("query gradient", DqKernel<T, W, decltype(warps)::value>,
                              {splits.count, heads}, Layout::kThreads, Layout::kBytes, p);
    }));

    PERFORMER_RETURN_IF_ERROR(this->SumState(splits, heads, dims_.groups, features, p.part_log_mass,
                                             call.grad_state.log_mass));
    PERFORMER_RETURN_IF_ERROR(this->SumState(splits, heads, dims_.groups,
                                             features * dims_.value_dim, p.part_mean,
                                             call.grad_state.mean));
    PERFORMER_RETURN_IF_ERROR(this->SumHeads(splits.count, heads, call.queries.projection_heads,
                                             features * dims_.key_dim, p.part_projection,
                                             call.grad_queries.projection));
    return this->SumHeads(splits.count, heads, call.queries.feature_bias_heads, features,
                          p.part_log_mass, call.grad_queries.feature_bias);
  }

  Status Summarize(const performer::SummarizeGradParams& call) const {
    const int64_t features = dims_.features, groups = dims_.groups;
    const int64_t rows = dims_.batch * dims_.keys, matrices = call.state.count * groups;
    Division splits;
    PERFORMER_RETURN_IF_ERROR(this->Divide(dims_.keys, kSplits, &splits));

    CenterParams<T> c;
    c.log_mass = static_cast<const float*>(call.state.log_mass);
    c.mean = static_cast<const float*>(call.state.mean);
    c.grad_log_mass = static_cast<const float*>(call.grad_state.log_mass);
    c.grad_mean = static_cast<const float*>(call.grad_state.mean);
    c.matrices = matrices;
    c.features = features;
    c.features_pad = this->features_pad_;
    c.width = static_cast<int>(dims_.value_dim);
    PERFORMER_RETURN_IF_ERROR(launcher_.Allocate(matrices * this->features_pad_ * W,
                                                 "the packed gradient of mean", &c.operand));
    for (float** to : {&c.center, &c.bias_part})
      PERFORMER_RETURN_IF_ERROR(launcher_.Allocate(matrices * features, "centers", to));
    float* peak = nullptr;
    if (std::is_same_v<T, Half>) {
      PERFORMER_RETURN_IF_ERROR(launcher_.Allocate(matrices, "centers", &peak));
      const GradPeakParams peaks = {c.grad_log_mass, c.grad_mean, features, dims_.value_dim, peak};
      PERFORMER_RETURN_IF_ERROR(launcher_.Launch("centers", GradPeakKernel, {matrices},
                                                 kPeakThreads, kPeakThreads / 32 * 4, peaks));
    }
    c.peak = peak;
    PERFORMER_RETURN_IF_ERROR(
        launcher_.Launch("centers", CenterKernel<T, W>,
                         {CeilDiv(matrices * this->features_pad_ * 32, kThreads)}, kThreads, 0, c));

    DkvParams<T> p;
    PERFORMER_RETURN_IF_ERROR(this->template PackProjection<W>(
        call.keys.projection, call.keys.projection_heads, &p.projection));
    p.peak = peak;
    p.keys = MakeKeyParams<T>(this->call_, call.keys);
    p.log_mass = c.log_mass;
    p.center = c.center;
    p.grad_mean = c.operand;
    p.state_count = call.state.count;
    p.map = map_;
    p.splits = splits.tiles;
    p.groups = groups;
    p.features = features;
    p.features_pad = this->features_pad_;
    p.grad_key = OutputRows<T>(call.grad_keys.key, groups, dims_.key_dim);
    p.grad_value = OutputRows<T>(call.grad_keys.value, groups, dims_.value_dim);
    PERFORMER_RETURN_IF_ERROR(this->AllocateBias(call.keys, call.grad_keys.bias, &p.grad_bias));
    p.bias_rows = dims_.keys;
    PERFORMER_RETURN_IF_ERROR(launcher_.Allocate(splits.count * groups * features * dims_.key_dim,
                                                 "partial gradients", &p.part_projection));
    PERFORMER_RETURN_IF_ERROR(this->template ForWarps<kWarps>(kFew, [&](auto warps) {
      using Layout = DkvLayout<T, W, decltype(warps)::value>;
      if (features > Layout::kFeatures)
        for (float** to : {&p.sum_key, &p.sum_value})
          PERFORMER_RETURN_IF_ERROR(launcher_.Allocate(rows * groups * W, "sums of gradients", to));
      return launcher_.Launch("key gradient", DkvKernel<T, W, decltype(warps)::value>,
                              {splits.count, groups}, Layout::kThreads, Layout::kBytes, p);
    }));
    PERFORMER_RETURN_IF_ERROR(this->SumHeads(splits.count, groups, call.keys.projection_heads,
                                             features * dims_.key_dim, p.part_projection,
                                             call.grad_keys.projection));
    return this->SumBias(call.keys, p.grad_bias, c.bias_part, call.grad_keys.bias);
  }

 private:
  using Operands<T>::dims_;
  using Operands<T>::launcher_;
  using Operands<T>::map_;
  using Gradients<T, W>::kThreads;
  static constexpr int kWarps = kBackwardWarps<T, W>;
  static constexpr int kFew = BackwardLayout<T, W, 4>::kFeatures;
};

}  // namespace cuda
}  // namespace performer
