// Launcher of the gradient of Causal. In this order:
//   states           before splits and tiles, as in the forward pass      causal/launch.cuh
//   origins          of values, in float32                                value_origin.cuh
//   query gradient   and row_max, log_sum, delta of each row              query_gradient.cuh
//   projection       the gradients of the query projection and of
//                    feature_bias, where they are asked for               query_projection.cuh
//   reverse states   of each split, with checkpoints; then merged from
//                    the last split to the first, before which is the
//                    gradient of the initial state                        reverse_states.cuh
//   dkv              the gradients of keys and values                     dkv.cuh
//   key projection   its gradient, where it is asked for                  key_projection.cuh
//   key_bias         where one bias is common to all keys                 common_bias.cuh
#pragma once
#include "cuda/kernels/backward/gradients.h"
#include "cuda/kernels/causal/launch.cuh"
#include "cuda/kernels/causal_backward/common_bias.cuh"
#include "cuda/kernels/causal_backward/dkv.cuh"
#include "cuda/kernels/causal_backward/key_projection.cuh"
#include "cuda/kernels/causal_backward/query_gradient.cuh"
#include "cuda/kernels/causal_backward/query_projection.cuh"
#include "cuda/kernels/causal_backward/reverse_states.cuh"
#include "cuda/kernels/causal_backward/value_origin.cuh"

namespace performer {
namespace cuda {

// The launches of one call, and what they hand on to each other.
template <class T, int W>
class CausalGradLauncher {
 public:
  CausalGradLauncher(const Context& context, const performer::CausalGradParams& call)
      : context_(context), dims_(context.dims), launcher_(context.launcher), call_(call) {}

  Status Run() {
    PERFORMER_RETURN_IF_ERROR(States());
    PERFORMER_RETURN_IF_ERROR(AllocateInitialGradients());
    if constexpr (!kIs16Bit<T>) PERFORMER_RETURN_IF_ERROR(Origins());
    PERFORMER_RETURN_IF_ERROR(QueryGradient());
    PERFORMER_RETURN_IF_ERROR(QueryProjection());
    PERFORMER_RETURN_IF_ERROR(ReverseStates());
    PERFORMER_RETURN_IF_ERROR(KeyGradients());
    PERFORMER_RETURN_IF_ERROR(SumInitialGradients());
    return KeyBias();
  }

 private:
  template <class Number>
  Status Allocate(int64_t count, Number** to) const {
    return launcher_.Allocate(count, "gradients", to);
  }

  // [N, G, M], elements.
  int64_t state_size() const { return dims_.sequences * dims_.groups * dims_.features; }

  Status States() {
    PERFORMER_RETURN_IF_ERROR(Allocate(state_size(), &log_mass_));
    PERFORMER_RETURN_IF_ERROR(Allocate(state_size() * dims_.value_dim, &mean_));
    performer::CausalParams forward;
    static_cast<Common&>(forward) = call_;
    forward.queries = call_.queries;
    forward.keys = call_.keys;
    forward.initial = call_.initial;
    forward.state = {log_mass_, mean_};
    PERFORMER_RETURN_IF_ERROR(
        (PrepareCausal<T, W>(context_, forward, kTile * kCheckpointTiles<T, W>, &pass_)));
    static_cast<CausalRowsParams<T>&>(common_) = pass_.params;
    common_.work = pass_.splits.tiles;
    common_.grad_out = MakeRows<const T>(call_.grad_out, dims_.heads, dims_.value_dim);
    return Status();
  }

  // One initial state for all sequences has the sum of their gradients.
  bool sums_initial_gradients() const { return call_.initial.count != dims_.sequences; }

  Status AllocateInitialGradients() {
    if (!sums_initial_gradients()) {
      grad_initial_log_mass_ = static_cast<float*>(call_.grad_initial.log_mass);
      grad_initial_mean_ = static_cast<float*>(call_.grad_initial.mean);
      return Status();
    }
    PERFORMER_RETURN_IF_ERROR(Allocate(state_size(), &grad_initial_log_mass_));
    return Allocate(state_size() * dims_.value_dim, &grad_initial_mean_);
  }

  Status SumInitialGradients() const {
    if (!sums_initial_gradients()) return Status();
    const int64_t size = dims_.groups * dims_.features;
    PERFORMER_RETURN_IF_ERROR(Sum(context_, 1, dims_.sequences, size, grad_initial_log_mass_,
                                  call_.grad_initial.log_mass));
    return Sum(context_, 1, dims_.sequences, size * dims_.value_dim, grad_initial_mean_,
               call_.grad_initial.mean);
  }

  Status Origins() {
    CausalOriginParams p;
    p.splits = pass_.splits.tiles;
    p.tiles = pass_.tiles.tiles;
    p.groups = dims_.groups;
    p.features = dims_.features;
    p.features_pad = context_.features_pad;
    p.before_log_mass = common_.before_log_mass;
    p.before_operand = common_.before_operand;
    p.before_each = common_.before_each;
    p.before_count = common_.before_count;
    p.checkpoints = pass_.params.checkpoints;
    PERFORMER_RETURN_IF_ERROR(Allocate(pass_.splits.count * 2 * dims_.groups * W, &p.origin));
    common_.origin = p.origin;
    return launcher_.Launch("origins of values", CausalOriginKernel,
                            {pass_.splits.count, dims_.groups}, W, 0, p);
  }

  void FillTileGradient(CausalTileGradientParams<T>* p) const {
    static_cast<CausalTileParams<T>&>(*p) = pass_.params;
    p->grad_out = common_.grad_out;
    p->origin = common_.origin;
  }

  Status QueryGradient() {
    using Layout = CausalQueryGradientLayout<T, W>;
    const int64_t count = dims_.batch * dims_.queries * dims_.heads;
    CausalQueryGradientParams<T> p;
    FillTileGradient(&p);
    p.grad_query = MakeRows<T>(call_.grad_queries.query, dims_.heads, dims_.key_dim);
    if constexpr (kHasRanged<T>)
      PERFORMER_RETURN_IF_ERROR(
          (PackProjection<Ranged<T>, W>(context_, call_.queries.projection,
                                        call_.queries.projection_heads, &p.ranged_projection)));
    else
      p.ranged_projection = p.projection;
    for (float** to : {&p.row_max, &p.delta, &p.log_sum})
      if (to != &p.log_sum || kKeepsLogSum<T>) PERFORMER_RETURN_IF_ERROR(Allocate(count, to));
    common_.statistics = {p.row_max, p.log_sum, p.delta};
    return launcher_.Launch("causal query gradient", CausalQueryGradientKernel<T, W>,
                            {pass_.tiles.count, dims_.heads}, Layout::kThreads, Layout::kBytes, p);
  }

  Status QueryProjection() {
    const QueryGradients& to = call_.grad_queries;
    const int64_t heads = dims_.heads, features = dims_.features, splits = pass_.splits.count;
    if (!call_.attributes.projection_gradient) {
      // Sums of no terms.
      PERFORMER_RETURN_IF_ERROR(Sum(context_, 1, 0,
                                    call_.queries.projection_heads * features * dims_.key_dim,
                                    nullptr, to.projection));
      return Sum(context_, 1, 0, call_.queries.feature_bias_heads * features, nullptr,
                 to.feature_bias);
    }
    using Layout = CausalQueryProjectionLayout<T, W>;
    CausalQueryProjectionParams<T> p;
    FillTileGradient(&p);
    p.statistics = common_.statistics;
    PERFORMER_RETURN_IF_ERROR(Allocate(splits * heads * features, &p.part_feature_bias));
    PERFORMER_RETURN_IF_ERROR(
        Allocate(splits * heads * features * dims_.key_dim, &p.part_projection));
    PERFORMER_RETURN_IF_ERROR(
        launcher_.Launch("causal query projection gradient", CausalQueryProjectionKernel<T, W>,
                         {splits, heads, CeilDiv(features, Layout::kFeatures)}, Layout::kThreads,
                         Layout::kBytes, p));
    PERFORMER_RETURN_IF_ERROR(SumHeads(context_, splits, heads, call_.queries.projection_heads,
                                       features * dims_.key_dim, p.part_projection, to.projection));
    return SumHeads(context_, splits, heads, call_.queries.feature_bias_heads, features,
                    p.part_feature_bias, to.feature_bias);
  }

  Status ReverseStates() {
    using Layout = ReverseStatesLayout<T, W>;
    const int64_t groups = dims_.groups, features = dims_.features, pad = context_.features_pad;
    const int64_t splits = pass_.splits.count, checkpoints = pass_.means.count * groups * pad;
    ReverseStatesParams<T> p;
    static_cast<CausalGradientParams<T>&>(p) = common_;
    p.projection = pass_.params.projection;
    p.tiles = pass_.tiles.tiles;
    p.checkpoint_tiles = pass_.means.tiles;
    p.feature_blocks = CeilDiv(features, Layout::kFeatures);
    p.tile_log_mass = pass_.params.checkpoints.log_mass;
    p.log_mass = log_mass_;
    PERFORMER_RETURN_IF_ERROR(Allocate(checkpoints * W, &p.checkpoints.sum));
    PERFORMER_RETURN_IF_ERROR(Allocate(checkpoints * kReverseNumbers, &p.checkpoints.numbers));
    PERFORMER_RETURN_IF_ERROR(Allocate(splits * groups * features, &p.part_mass));
    PERFORMER_RETURN_IF_ERROR(Allocate(splits * groups * features * dims_.value_dim, &p.part_mean));
    reverse_ = p.checkpoints;
    PERFORMER_RETURN_IF_ERROR(launcher_.Launch("reverse states", ReverseStatesKernel<T, W>,
                                               {splits * p.feature_blocks, groups},
                                               Layout::kThreads, Layout::kBytes, p));
    return MergeReverseStates(p.part_mean, p.part_mass);
  }

  Status MergeReverseStates(const float* part_mean, const float* part_mass) {
    const int64_t states = pass_.splits.count * dims_.groups * context_.features_pad;
    const int64_t states_of_sequences = dims_.sequences * dims_.groups * context_.features_pad;
    MergeReverseStatesParams p;
    ReverseNumber<T>* after = nullptr;
    PERFORMER_RETURN_IF_ERROR(Allocate(states * W, &after));
    PERFORMER_RETURN_IF_ERROR(Allocate(states * kAfterNumbers, &p.after.numbers));
    p.after.sum = after;
    p.splits = pass_.splits.tiles;
    p.groups = dims_.groups;
    p.features = dims_.features;
    p.features_pad = context_.features_pad;
    p.width = static_cast<int>(dims_.value_dim);
    p.inverse_root = context_.map.inverse_root;
    p.part_mean = part_mean;
    p.part_mass = part_mass;
    p.before_log_mass = common_.before_log_mass;
    p.before_each = common_.before_each;
    p.log_mass = log_mass_;
    p.mean = mean_;
    p.grad_log_mass = static_cast<const float*>(call_.grad_state.log_mass);
    p.grad_mean = static_cast<const float*>(call_.grad_state.mean);
    p.initial_log_mass = static_cast<const float*>(call_.initial.log_mass);
    p.initial_mean = static_cast<const float*>(call_.initial.mean);
    p.initial_count = call_.initial.count;
    p.grad_initial_log_mass = grad_initial_log_mass_;
    p.grad_initial_mean = grad_initial_mean_;
    p.origin = common_.origin;
    p.padded_width = W;
    after_ = p.after;
    return launcher_.Launch("merge reverse states", MergeReverseStatesKernel<ReverseNumber<T>>,
                            {CeilDiv(states_of_sequences * 32, kElementwiseThreads)},
                            kElementwiseThreads, 0, p);
  }

  Status KeyGradients() {
    using Layout = CausalDkvLayout<T, W>;
    CausalDkvParams<T> p;
    static_cast<CausalGradientParams<T>&>(p) = common_;
    p.work = pass_.tiles.tiles;
    p.splits = pass_.splits.tiles;
    p.checkpoint_tiles = pass_.means.tiles;
    p.tile_log_mass = pass_.params.checkpoints.log_mass;
    PERFORMER_RETURN_IF_ERROR((PackProjection<T, W>(context_, call_.keys.projection,
                                                    call_.keys.projection_heads, &p.projection)));
    PERFORMER_RETURN_IF_ERROR((PackOperands<T, W>(
        context_, call_.queries.projection, call_.queries.projection_heads, &p.query_operands)));
    p.query_projections = call_.queries.projection_heads;
    p.reverse = reverse_;
    p.after = after_;
    p.grad_key = MakeRows<T>(call_.grad_keys.key, dims_.groups, dims_.key_dim);
    p.grad_value = MakeRows<T>(call_.grad_keys.value, dims_.groups, dims_.value_dim);
    PERFORMER_RETURN_IF_ERROR(
        AllocateBias(context_, call_.keys, call_.grad_keys.bias, &grad_bias_));
    p.grad_bias = grad_bias_;
    p.bias_rows = dims_.keys;
    PERFORMER_RETURN_IF_ERROR(launcher_.Launch("causal key gradient", CausalDkvKernel<T, W>,
                                               {pass_.tiles.count, dims_.groups}, Layout::kThreads,
                                               Layout::kBytes, p));
    return KeyProjection(p);
  }

  // 0 where it is not asked for.
  Status KeyProjection(CausalDkvParams<T> p) const {
    using Layout = CausalKeyProjectionLayout<T, W>;
    const int64_t groups = dims_.groups, size = dims_.features * dims_.key_dim;
    int64_t splits = 0;
    if (call_.attributes.projection_gradient) {
      splits = pass_.splits.count;
      p.feature_blocks = CeilDiv(dims_.features, Layout::kFeatures);
      PERFORMER_RETURN_IF_ERROR(Allocate(splits * groups * size, &p.part_projection));
      PERFORMER_RETURN_IF_ERROR(launcher_.Launch(
          "causal key projection gradient", CausalKeyProjectionKernel<T, W>,
          {splits * p.feature_blocks, groups}, Layout::kThreads, Layout::kBytes, p));
    }
    return SumHeads(context_, splits, groups, call_.keys.projection_heads, size, p.part_projection,
                    call_.grad_keys.projection);
  }

  Status KeyBias() const {
    float* common = nullptr;
    if (call_.keys.bias_length != dims_.keys) {
      PERFORMER_RETURN_IF_ERROR(Allocate(state_size(), &common));
      CommonBiasParams p;
      p.sequences = dims_.sequences;
      p.groups = dims_.groups;
      p.features = dims_.features;
      p.packed = context_.packed();
      p.bias = common_.keys.bias;
      p.log_mass = log_mass_;
      p.grad_log_mass = static_cast<const float*>(call_.grad_state.log_mass);
      p.grad_initial_log_mass = grad_initial_log_mass_;
      p.common = common;
      PERFORMER_RETURN_IF_ERROR(launcher_.Launch("gradient of key_bias", CommonBiasKernel,
                                                 {CeilDiv(state_size(), kElementwiseThreads)},
                                                 kElementwiseThreads, 0, p));
    }
    return SumBias(context_, call_.keys, grad_bias_, common, call_.grad_keys.bias);
  }

  const Context& context_;
  const Dims& dims_;
  const Launcher& launcher_;
  const performer::CausalGradParams& call_;
  CausalPass<T> pass_;
  CausalGradientParams<T> common_;
  float* log_mass_ = nullptr;               // [N, G, M]: the final state
  float* mean_ = nullptr;                   // [N, G, M, E]
  float* grad_initial_log_mass_ = nullptr;  // [N, G, M]
  float* grad_initial_mean_ = nullptr;      // [N, G, M, E]
  ReverseCheckpoints<T> reverse_;
  StatesAfterSplits after_;
  float* grad_bias_ = nullptr;  // [B, G, S] or nullptr
};

template <class T>
Status RunCausalGrad(const performer::CausalGradParams& call, const Device& device) {
  const Context context(call, device);
  return WithWidth(call.dims, [&](auto width) {
    return CausalGradLauncher<T, decltype(width)::value>(context, call).Run();
  });
}

}  // namespace cuda
}  // namespace performer
