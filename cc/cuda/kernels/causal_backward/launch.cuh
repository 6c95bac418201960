// Launcher of the gradient of Causal:
//   forward    states before splits, outputs not rounded                       causal/launch.cuh
//   rows       lse and delta of each                                        causal_backward/row_statistics.cuh
//   delta      corrected, in 16 bits                                      causal_backward/dq.cuh
//   queries    dq, and log_mass before each chunk                            causal_backward/dq.cuh
//   reverse states   of splits, merged from behind                                          causal_backward/reverse_state.cuh
//   keys       dk, dv, the gradient of the initial state                       causal_backward/dkv.cuh
#pragma once
#include "cuda/kernels/backward/gradients.h"
#include "cuda/kernels/causal/launch.cuh"
#include "cuda/kernels/causal_backward/common_bias.cuh"
#include "cuda/kernels/causal_backward/dkv.cuh"
#include "cuda/kernels/causal_backward/dq.cuh"
#include "cuda/kernels/causal_backward/reverse_state.cuh"
#include "cuda/kernels/causal_backward/row_statistics.cuh"

namespace performer {
namespace cuda {

template <class T, int W>
class CausalGrad : public Gradients<T, W> {
 public:
  CausalGrad(const performer::CausalGradParams& call, const Device& device)
      : Gradients<T, W>(call, device), given_(call), device_(device) {}

  Status Run() {
    PERFORMER_RETURN_IF_ERROR(Prepare());
    PERFORMER_RETURN_IF_ERROR(Statistics());
    PERFORMER_RETURN_IF_ERROR(Dq());
    PERFORMER_RETURN_IF_ERROR(ReverseStates());
    return Dkv();
  }

 private:
  using Operands<T>::dims_;
  using Operands<T>::launcher_;
  using Operands<T>::map_;
  using Gradients<T, W>::kThreads;
  static constexpr int kWarps = kCausalBackwardWarps<W>;

  template <class Number>
  Status Allocate(int64_t count, Number** to) const {
    return launcher_.Allocate(count, "gradients", to);
  }

  // The forward pass, and what all kernels share.
  Status Prepare() {
    const int64_t states = dims_.sequences * dims_.groups * dims_.features;
    PERFORMER_RETURN_IF_ERROR(Allocate(states, &log_mass_));
    PERFORMER_RETURN_IF_ERROR(Allocate(states * dims_.value_dim, &mean_));
    performer::CausalParams forward;
    static_cast<Common&>(forward) = given_;
    forward.queries = given_.queries;
    forward.keys = given_.keys;
    forward.initial = given_.initial;
    forward.state = {log_mass_, mean_};
    const Causal<T, W> causal(forward, device_);
    PERFORMER_RETURN_IF_ERROR(causal.Run(forward, &parts_));
    if (given_.initial.count == dims_.sequences) {
      grad_initial_log_mass_ = static_cast<float*>(given_.grad_initial.log_mass);
      grad_initial_mean_ = static_cast<float*>(given_.grad_initial.mean);
    } else {  // one state for all: a sum
      PERFORMER_RETURN_IF_ERROR(Allocate(states, &grad_initial_log_mass_));
      PERFORMER_RETURN_IF_ERROR(Allocate(states * dims_.value_dim, &grad_initial_mean_));
    }
    query_ = InputRows<T>(given_.queries.query, dims_.heads, dims_.key_dim);
    grad_out_ = InputRows<T>(given_.grad_out, dims_.heads, dims_.value_dim);
    keys_ = MakeKeyParams<T>(given_, given_.keys);
    return this->template PackProjection<W>(given_.keys.projection, given_.keys.projection_heads,
                                            &key_projection_);
  }

  Status Statistics() {
    const int64_t count = dims_.batch * dims_.queries * dims_.heads;
    for (float** to : {&lse_, &delta_}) PERFORMER_RETURN_IF_ERROR(Allocate(count, to));
    CausalStatisticsParams<T> p;
    p.part_out = parts_.out;
    p.part_lse = parts_.lse;
    p.parts = parts_.count;
    p.rows = dims_.batch * dims_.queries;
    p.grad_out = grad_out_;
    p.lse = lse_;
    p.delta = delta_;
    return launcher_.Launch("statistics of rows", CausalStatisticsKernel<T, W>,
                            {CeilDiv(count * 32, kThreads)}, kThreads, 0, p);
  }

  Status Dq() {
    const Division& splits = parts_.splits;
    const int64_t heads = dims_.heads, features = dims_.features;
    const int64_t rows = dims_.batch * dims_.queries, parts = splits.count * heads * features;
    CausalDqParams<T> p;
    p.query = query_;
    p.grad_out = grad_out_;
    p.keys = keys_;
    p.projection = parts_.projection;
    p.key_operands = parts_.key_operands;
    p.key_head_step = given_.keys.projection_heads == 1 ? 0 : this->features_pad_;
    p.feature_bias = static_cast<const float*>(given_.queries.feature_bias);
    p.feature_bias_heads = given_.queries.feature_bias_heads;
    p.map = map_;
    p.splits = splits.tiles;
    p.groups = dims_.groups;
    p.features = features;
    p.features_pad = this->features_pad_;
    p.before_log_mass = parts_.before_log_mass;
    p.before_mean = parts_.before_mean;
    p.before_each = parts_.before_each;
    p.before_count = parts_.before_count;
    p.lse = lse_;
    p.delta = delta_;
    p.grad_query = OutputRows<T>(given_.grad_queries.query, heads, dims_.key_dim);
    PERFORMER_RETURN_IF_ERROR(Allocate(
        ChunkSlot(splits.count, rows + kChunkRows<T>, kChunkRows<T>) * dims_.groups * features,
        &chunk_log_mass_));
    p.chunk_log_mass = chunk_log_mass_;
    PERFORMER_RETURN_IF_ERROR(Allocate(parts, &p.part_feature_bias));
    PERFORMER_RETURN_IF_ERROR(Allocate(parts * dims_.key_dim, &p.part_projection));
    if constexpr (kHasRanged<T>) {  // some operands in two types: 8 warps do not fit everywhere
      PERFORMER_RETURN_IF_ERROR(this->template ForWarps<kWarps>(
          0, [&](auto warps) { return LaunchDq<decltype(warps)::value>(p); }));
    } else {
      static_assert(W > 64 || CausalDqLayout<T, W, kWarps>::kBytes <= kSmallSharedBytes);
      PERFORMER_RETURN_IF_ERROR(LaunchDq<kWarps>(p));
    }
    PERFORMER_RETURN_IF_ERROR(this->SumHeads(splits.count, heads, given_.queries.projection_heads,
                                             features * dims_.key_dim, p.part_projection,
                                             given_.grad_queries.projection));
    return this->SumHeads(splits.count, heads, given_.queries.feature_bias_heads, features,
                          p.part_feature_bias, given_.grad_queries.feature_bias);
  }

  template <int kWarps>
  Status LaunchDq(CausalDqParams<T> p) {
    using Layout = CausalDqLayout<T, W, kWarps>;
    const int64_t each = dims_.batch * dims_.queries * dims_.heads;
    const Grid grid = {parts_.splits.count, dims_.heads};
    if (dims_.features > Layout::kFeatures)
      PERFORMER_RETURN_IF_ERROR(Allocate(each * W, &p.sum_query));
    if constexpr (kIs16Bit<T>) {
      PERFORMER_RETURN_IF_ERROR(Allocate(each, &p.corrected_delta));
      PERFORMER_RETURN_IF_ERROR(launcher_.Launch("causal delta", CausalDeltaKernel<T, W, kWarps>,
                                                 grid, Layout::kThreads, Layout::kBytes, p));
      p.delta = delta_ = p.corrected_delta;
    }
    return launcher_.Launch("causal query gradient", CausalDqKernel<T, W, kWarps>, grid,
                            Layout::kThreads, Layout::kBytes, p);
  }

  Status ReverseStates() {
    const Division& splits = parts_.splits;
    const int64_t states = splits.count * dims_.groups * dims_.features;
    const int64_t parts = splits.count * dims_.heads * dims_.features;
    float *part_mean = nullptr, *part_mass = nullptr;
    PERFORMER_RETURN_IF_ERROR(Allocate(states, &after_mass_));
    PERFORMER_RETURN_IF_ERROR(Allocate(states * dims_.value_dim, &after_mean_));
    if (splits.most > 1) {
      using Kernel = ReverseStateLayout<T, W>;
      PERFORMER_RETURN_IF_ERROR(Allocate(parts, &part_mass));
      PERFORMER_RETURN_IF_ERROR(Allocate(parts * dims_.value_dim, &part_mean));
      ReverseStateParams<T> p;
      p.query = query_;
      p.grad_out = grad_out_;
      p.projection = parts_.projection;
      p.feature_bias = static_cast<const float*>(given_.queries.feature_bias);
      p.feature_bias_heads = given_.queries.feature_bias_heads;
      p.before_log_mass = parts_.before_log_mass;
      p.map = map_;
      p.splits = splits.tiles;
      p.groups = dims_.groups;
      p.features = dims_.features;
      p.features_pad = this->features_pad_;
      p.lse = lse_;
      p.delta = delta_;
      p.part_mean = part_mean;
      p.part_mass = part_mass;
      const Grid grid = {splits.count, dims_.heads, CeilDiv(dims_.features, Kernel::kFeatures)};
      PERFORMER_RETURN_IF_ERROR(launcher_.Launch("reverse states", ReverseStateKernel<T, W>, grid,
                                                 Kernel::kThreads, Kernel::kBytes, p));
    }
    MergeReverseStatesParams p;
    p.splits = splits.tiles;
    p.heads = dims_.heads;
    p.groups = dims_.groups;
    p.features = dims_.features;
    p.width = static_cast<int>(dims_.value_dim);
    p.part_mean = part_mean;
    p.part_mass = part_mass;
    p.before_log_mass = parts_.before_log_mass;
    p.log_mass = log_mass_;
    p.mean = mean_;
    p.grad_log_mass = static_cast<const float*>(given_.grad_state.log_mass);
    p.grad_mean = static_cast<const float*>(given_.grad_state.mean);
    p.after_mean = after_mean_;
    p.after_mass = after_mass_;
    p.grad_initial_log_mass = grad_initial_log_mass_;
    p.grad_initial_mean = grad_initial_mean_;
    const int64_t rows = dims_.sequences * dims_.groups * dims_.features;
    return launcher_.Launch("merge reverse states", MergeReverseStatesKernel,
                            {CeilDiv(rows * 32, kThreads)}, kThreads, 0, p);
  }

  Status Dkv() {
    const Division& splits = parts_.splits;
    const int64_t groups = dims_.groups, features = dims_.features;
    const int64_t rows = dims_.batch * dims_.keys;
    CausalDkvParams<T> p;
    p.query = query_;
    p.grad_out = grad_out_;
    p.keys = keys_;
    p.projection = key_projection_;
    PERFORMER_RETURN_IF_ERROR(this->template PackOperands<W>(
        given_.queries.projection, given_.queries.projection_heads, &p.query_operands));
    p.query_projections = given_.queries.projection_heads;
    p.feature_bias = static_cast<const float*>(given_.queries.feature_bias);
    p.feature_bias_heads = given_.queries.feature_bias_heads;
    p.map = map_;
    p.splits = splits.tiles;
    p.groups = groups;
    p.features = features;
    p.features_pad = this->features_pad_;
    p.before_log_mass = parts_.before_log_mass;
    p.before_mean = parts_.before_mean;
    p.log_mass = log_mass_;
    p.before_each = parts_.before_each;
    p.before_count = parts_.before_count;
    p.lse = lse_;
    p.delta = delta_;
    p.chunk_log_mass = chunk_log_mass_;
    p.after_mean = after_mean_;
    p.after_mass = after_mass_;
    p.grad_key = OutputRows<T>(given_.grad_keys.key, groups, dims_.key_dim);
    p.grad_value = OutputRows<T>(given_.grad_keys.value, groups, dims_.value_dim);
    PERFORMER_RETURN_IF_ERROR(this->AllocateBias(given_.keys, given_.grad_keys.bias, &p.grad_bias));
    p.bias_rows = dims_.keys;
    for (float** to : {&p.sum_key, &p.sum_value})
      PERFORMER_RETURN_IF_ERROR(Allocate(rows * groups * W, to));
    PERFORMER_RETURN_IF_ERROR(
        Allocate(splits.count * groups * features * dims_.key_dim, &p.part_projection));
    p.grad_initial_log_mass = grad_initial_log_mass_;
    p.grad_initial_mean = grad_initial_mean_;
    constexpr int kFew = CausalBackwardLayout<T, W, 4>::kFeatures;
    PERFORMER_RETURN_IF_ERROR(this->template ForWarps<kWarps>(kFew, [&](auto warps) {
      using Layout = CausalDkvLayout<T, W, decltype(warps)::value>;
      return launcher_.Launch("causal key gradient", CausalDkvKernel<T, W, decltype(warps)::value>,
                              {splits.count, groups}, Layout::kThreads, Layout::kBytes, p);
    }));
    PERFORMER_RETURN_IF_ERROR(this->SumHeads(splits.count, groups, given_.keys.projection_heads,
                                             features * dims_.key_dim, p.part_projection,
                                             given_.grad_keys.projection));
    if (given_.initial.count != dims_.sequences) {
      PERFORMER_RETURN_IF_ERROR(this->Sum(1, dims_.sequences, groups * features,
                                          grad_initial_log_mass_,
                                          static_cast<float*>(given_.grad_initial.log_mass)));
      PERFORMER_RETURN_IF_ERROR(this->Sum(1, dims_.sequences, groups * features * dims_.value_dim,
                                          grad_initial_mean_,
                                          static_cast<float*>(given_.grad_initial.mean)));
    }
    return Bias(p.grad_bias);
  }

  Status Bias(const float* each) const {
    float* common = nullptr;
    if (given_.keys.bias_length != dims_.keys) {
      CommonBiasParams c;
      c.sequences = dims_.sequences;
      c.groups = dims_.groups;
      c.features = dims_.features;
      c.packed = this->packed();
      c.bias = keys_.bias;
      c.log_mass = log_mass_;
      c.grad_log_mass = static_cast<const float*>(given_.grad_state.log_mass);
      c.grad_initial_log_mass = grad_initial_log_mass_;
      const int64_t count = c.sequences * c.groups * c.features;
      PERFORMER_RETURN_IF_ERROR(Allocate(count, &common));
      c.common = common;
      PERFORMER_RETURN_IF_ERROR(launcher_.Launch("gradient of key_bias", CommonBiasKernel,
                                                 {CeilDiv(count, kThreads)}, kThreads, 0, c));
    }
    return this->SumBias(given_.keys, each, common, given_.grad_keys.bias);
  }

  const performer::CausalGradParams& given_;
  const Device& device_;
  CausalParts<T> parts_;
  RowsOf<const T> query_, grad_out_;
  KeyParams<T> keys_;
  Projection<T> key_projection_;
  float *log_mass_ = nullptr, *mean_ = nullptr;  // final state
  float *grad_initial_log_mass_ = nullptr, *grad_initial_mean_ = nullptr;
  float *lse_ = nullptr, *delta_ = nullptr, *chunk_log_mass_ = nullptr;
  float *after_mean_ = nullptr, *after_mass_ = nullptr;
};

}  // namespace cuda
}  // namespace performer
