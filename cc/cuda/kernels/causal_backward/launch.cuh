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
#include "cuda/kernels/causal/launch.cuh"
#include "cuda/kernels/causal_backward/common_bias.cuh"
#include "cuda/kernels/causal_backward/dkv.cuh"
#include "cuda/kernels/causal_backward/key_projection.cuh"
#include "cuda/kernels/causal_backward/query_gradient.cuh"
#include "cuda/kernels/causal_backward/query_projection.cuh"
#include "cuda/kernels/causal_backward/reverse_states.cuh"
#include "cuda/kernels/causal_backward/state_grad_launcher.cuh"
#include "cuda/kernels/causal_backward/value_origin.cuh"

namespace performer {
namespace cuda {

// The launches of one call, and what they hand on to each other.
template <class T, int W>
class CausalGradLauncher : StateGradLauncher<T, W, performer::CausalGradParams> {
  using Base = StateGradLauncher<T, W, performer::CausalGradParams>;
  using Base::Allocate, Base::AllocateStates, Base::AllocateInitialGradients;
  using Base::context_, Base::dims_, Base::launcher_, Base::call_;
  using Base::log_mass_, Base::grad_initial_log_mass_;

 public:
  CausalGradLauncher(const Context& context, const performer::CausalGradParams& call)
      : Base(context, call) {}

  Status Run() {
    PERFORMER_RETURN_IF_ERROR(States());
    PERFORMER_RETURN_IF_ERROR(AllocateInitialGradients());
    if constexpr (!kIs16Bit<T>) PERFORMER_RETURN_IF_ERROR(Origins());
    PERFORMER_RETURN_IF_ERROR(QueryGradient());
    PERFORMER_RETURN_IF_ERROR(QueryProjection());
    PERFORMER_RETURN_IF_ERROR(ReverseStates());
    PERFORMER_RETURN_IF_ERROR(KeyGradients());
    PERFORMER_RETURN_IF_ERROR(Base::SumInitialGradients());
    return KeyBias();
  }

 private:
  Status States() {
    performer::CausalParams forward;
    PERFORMER_RETURN_IF_ERROR(AllocateStates(&forward));
    PERFORMER_RETURN_IF_ERROR(
        (PrepareCausal<T, W>(context_, forward, kTile * kCheckpointTiles<T, W>, &pass_)));
    static_cast<CausalRowsParams<T>&>(common_) = pass_.params;
    common_.work = pass_.splits.tiles;
    common_.grad_out = MakeRows<const T>(call_.grad_out, dims_.heads, dims_.value_dim);
    return Status();
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
                            {pass_.tiles.count, dims_.heads, kSlices<W>}, Layout::kThreads,
                            Layout::kBytes, p);
  }

  Status QueryProjection() const {
    using Layout = CausalQueryProjectionLayout<T, W>;
    const int64_t heads = dims_.heads, features = dims_.features;
    int64_t splits = 0;
    CausalQueryProjectionParams<T> p;
    if (call_.attributes.projection_gradient) {
      splits = pass_.splits.count;
      FillTileGradient(&p);
      p.statistics = common_.statistics;
      PERFORMER_RETURN_IF_ERROR(Allocate(splits * heads * features, &p.part_feature_bias));
      PERFORMER_RETURN_IF_ERROR(
          Allocate(splits * heads * features * dims_.key_dim, &p.part_projection));
      PERFORMER_RETURN_IF_ERROR(
          launcher_.Launch("causal query projection gradient", CausalQueryProjectionKernel<T, W>,
                           {splits, heads, CeilDiv(features, Layout::kFeatures) * kSlices<W>},
                           Layout::kThreads, Layout::kBytes, p));
    }
    return Base::SumQueryProjection(splits, p.part_projection, p.part_feature_bias);
  }

  Status ReverseStates() {
    using Layout = ReverseStatesLayout<T, W>;
    const int64_t splits = pass_.splits.count;
    ReverseStatesParams<T> p;
    static_cast<CausalGradientParams<T>&>(p) = common_;
    p.projection = pass_.params.projection;
    p.tiles = pass_.tiles.tiles;
    p.checkpoint_tiles = pass_.means.tiles;
    p.feature_blocks = CeilDiv(dims_.features, Layout::kFeatures);
    p.tile_log_mass = pass_.params.checkpoints.log_mass;
    p.log_mass = log_mass_;
    PERFORMER_RETURN_IF_ERROR(Base::AllocateReverseStates(splits, pass_.means.count, &p));
    reverse_ = p.checkpoints;
    PERFORMER_RETURN_IF_ERROR(launcher_.Launch("reverse states", ReverseStatesKernel<T, W>,
                                               {splits * p.feature_blocks, dims_.groups},
                                               Layout::kThreads, Layout::kBytes, p));
    return Base::MergeReverseStates(p, pass_.splits, true, call_.initial.mean, &after_);
  }

  Status KeyGradients() {
    using Layout = CausalDkvLayout<T, W>;
    CausalDkvParams<T> p;
    static_cast<CausalGradientParams<T>&>(p) = common_;
    p.work = pass_.tiles.tiles;
    p.splits = pass_.splits.tiles;
    p.checkpoint_tiles = pass_.means.tiles;
    p.tile_log_mass = pass_.params.checkpoints.log_mass;
    PERFORMER_RETURN_IF_ERROR(Base::FillKeyGradients(&p));
    PERFORMER_RETURN_IF_ERROR((PackOperands<T, W>(
        context_, call_.queries.projection, call_.queries.projection_heads, &p.query_operands)));
    p.query_projections = call_.queries.projection_heads;
    p.reverse = reverse_;
    p.after = after_;
    PERFORMER_RETURN_IF_ERROR(launcher_.Launch("causal key gradient", CausalDkvKernel<T, W>,
                                               {pass_.tiles.count, dims_.groups, kSlices<W>},
                                               Layout::kThreads, Layout::kBytes, p));
    return KeyProjection(p);
  }

  Status KeyProjection(CausalDkvParams<T> p) const {
    using Layout = CausalKeyProjectionLayout<T, W>;
    const int64_t groups = dims_.groups;
    int64_t splits = 0;
    if (call_.attributes.projection_gradient) {
      splits = pass_.splits.count;
      p.feature_blocks = CeilDiv(dims_.features, Layout::kFeatures);
      PERFORMER_RETURN_IF_ERROR(
          Allocate(splits * groups * dims_.features * dims_.key_dim, &p.part_projection));
      PERFORMER_RETURN_IF_ERROR(launcher_.Launch(
          "causal key projection gradient", CausalKeyProjectionKernel<T, W>,
          {splits * p.feature_blocks, groups}, Layout::kThreads, Layout::kBytes, p));
    }
    return Base::SumKeyProjection(splits, p.part_projection);
  }

  Status KeyBias() const {
    return Base::KeyBias([&](float* common) {
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
      return launcher_.Launch("gradient of key_bias", CommonBiasKernel,
                              {CeilDiv(Base::state_size(), kElementwiseThreads)},
                              kElementwiseThreads, 0, p);
    });
  }

  CausalPass<T> pass_;
  CausalGradientParams<T> common_;
  ReverseCheckpoints<T> reverse_;
  StatesAfterSplits after_;
};

template <class T>
Status RunCausalGrad(const performer::CausalGradParams& call, const Device& device) {
  const Context context(call, device);
  return WithWidth<T>(call.dims, [&](auto width) {
    return CausalGradLauncher<T, decltype(width)::value>(context, call).Run();
  });
}

}  // namespace cuda
}  // namespace performer
