// Launcher of the gradient of NearFar. In this order:
//   origins          of values, in float32, and values less these         value_origin.cuh
//   states           of far keys, as in the forward pass                  near_far/launch.cuh
//   query gradient   and statistics of each row                           query_gradient.cuh
//   query projection the gradients of the projection of queries and of
//                    feature_bias, where they are asked for               query_projection.cuh
//   reverse states   of each split, with checkpoints; then merged from
//                    the last split to the first, before which is the
//                    gradient of the initial state; likewise in the
//                    other direction, unless causal                       reverse_states.cuh
//   key gradients    and those of values                                  key_gradients.cuh
//   key projection   its gradient, where it is asked for                  key_projection.cuh
//   key_bias         where one bias is common to all keys                 common_bias.cuh
#pragma once
#include "cuda/kernels/causal_backward/state_grad_launcher.cuh"
#include "cuda/kernels/near_far/launch.cuh"
#include "cuda/kernels/near_far_backward/common_bias.cuh"
#include "cuda/kernels/near_far_backward/key_gradients.cuh"
#include "cuda/kernels/near_far_backward/key_projection.cuh"
#include "cuda/kernels/near_far_backward/query_gradient.cuh"
#include "cuda/kernels/near_far_backward/query_projection.cuh"
#include "cuda/kernels/near_far_backward/reverse_states.cuh"
#include "cuda/kernels/near_far_backward/value_origin.cuh"

namespace performer {
namespace cuda {

// The launches of one call, and what they hand on to each other.
template <class T, int W>
class NearFarGradLauncher : StateGradLauncher<T, W, performer::NearFarGradParams> {
  using Base = StateGradLauncher<T, W, performer::NearFarGradParams>;
  using Base::Allocate, Base::AllocateStates, Base::AllocateInitialGradients;
  using Base::context_, Base::dims_, Base::launcher_, Base::call_;
  using Base::log_mass_, Base::grad_initial_log_mass_;

 public:
  NearFarGradLauncher(const Context& context, const performer::NearFarGradParams& call)
      : Base(context, call) {}

  Status Run() {
    PERFORMER_RETURN_IF_ERROR(States());
    PERFORMER_RETURN_IF_ERROR(AllocateInitialGradients());
    PERFORMER_RETURN_IF_ERROR(QueryGradient());
    PERFORMER_RETURN_IF_ERROR(QueryProjection());
    PERFORMER_RETURN_IF_ERROR(ReverseStates(false, &before_));
    if (log_mass_of_all_ != nullptr) PERFORMER_RETURN_IF_ERROR(ReverseStates(true, &after_));
    PERFORMER_RETURN_IF_ERROR(KeyGradients());
    PERFORMER_RETURN_IF_ERROR(Base::SumInitialGradients());
    return KeyBias();
  }

 private:
  Status States() {
    PERFORMER_RETURN_IF_ERROR(AllocateStates(&forward_));
    forward_.start = call_.start;
    PERFORMER_RETURN_IF_ERROR(DivideNearFar(context_, forward_, &division_));
    if constexpr (!kIs16Bit<T>) PERFORMER_RETURN_IF_ERROR(SubtractOrigins());
    PERFORMER_RETURN_IF_ERROR(
        (LaunchFarStates<T, W>(context_, forward_, division_, &steps_, &log_mass_of_all_)));
    PERFORMER_RETURN_IF_ERROR((FillSteps<T, W>(context_, forward_, division_, &steps_)));
    grad_out_ = MakeRows<const T>(call_.grad_out, dims_.heads, dims_.value_dim);
    return Status();
  }

  // Values and initial means of the call become those less their origins.
  Status SubtractOrigins() {
    const int64_t rows = dims_.sequences * dims_.groups, count = call_.initial.count;
    PERFORMER_RETURN_IF_ERROR(Allocate(rows * W, &origins_.origin));
    PERFORMER_RETURN_IF_ERROR(Allocate(rows, &origins_.first_block));
    origins_.values = static_cast<const float*>(call_.keys.value);
    NearFarOriginParams p;
    p.geometry = division_.geometry;
    context_.FillKeys(call_.keys, &p.keys);
    p.groups = dims_.groups;
    p.features = dims_.features;
    p.width = static_cast<int>(dims_.value_dim);
    p.padded_width = W;
    p.initial_log_mass = static_cast<const float*>(call_.initial.log_mass);
    p.initial_mean = static_cast<const float*>(call_.initial.mean);
    p.initial_count = count;
    p.origins = origins_;
    PERFORMER_RETURN_IF_ERROR(
        Allocate(dims_.batch * dims_.keys * dims_.groups * dims_.value_dim, &p.less_values));
    PERFORMER_RETURN_IF_ERROR(
        Allocate(count * dims_.groups * dims_.features * dims_.value_dim, &p.less_initial_mean));
    PERFORMER_RETURN_IF_ERROR(launcher_.Launch("origins of values", NearFarOriginKernel,
                                               {dims_.sequences, dims_.groups}, W,
                                               W * static_cast<int>(sizeof(int64_t)), p));
    forward_.keys.value = p.less_values;
    forward_.initial.mean = p.less_initial_mean;
    if (dims_.value_dim == 0 || dims_.sequences == 0) return Status();
    PERFORMER_RETURN_IF_ERROR(launcher_.Launch("values less their origin", NearFarValuesKernel,
                                               {division_.blocks.count, dims_.groups},
                                               kLessOriginThreads, 0, p));
    return launcher_.Launch("means less their origin", NearFarInitialMeanKernel,
                            {count, dims_.groups}, kLessOriginThreads, 0, p);
  }

  Status QueryGradient() {
    const int64_t count = dims_.batch * dims_.queries * dims_.heads;
    for (float** to :
         {&statistics_.near_max, &statistics_.far_max, &statistics_.delta, &statistics_.log_sum})
      if (to != &statistics_.log_sum || kKeepsLogSum<T>)
        PERFORMER_RETURN_IF_ERROR(Allocate(count, to));
    if (count == 0) return Status();
    NearFarQueryGradientParams<T> p;
    static_cast<NearFarStepsParams<T>&>(p) = steps_;
    p.grad_out = grad_out_;
    p.log_weight = static_cast<const float*>(call_.log_weight);
    p.grad_log_weight = static_cast<const float*>(call_.grad_log_weight);
    p.origins = origins_;
    p.grad_query = MakeRows<T>(call_.grad_queries.query, dims_.heads, dims_.key_dim);
    p.statistics = statistics_;
    return division_.geometry.causal ? LaunchQueryGradient<false>(p) : LaunchQueryGradient<true>(p);
  }

  // Tiles of all blocks.
  int64_t tiles() const {
    return division_.blocks.count * CeilDiv(division_.geometry.window, kTile);
  }

  template <bool kBoth>
  Status LaunchQueryGradient(const NearFarQueryGradientParams<T>& p) const {
    using Layout = NearFarQueryGradientLayout<T, W, kBoth>;
    return launcher_.Launch("near and far query gradient", NearFarQueryGradientKernel<T, W, kBoth>,
                            {tiles(), dims_.heads, kSlices<W>}, Layout::kThreads, Layout::kBytes,
                            p);
  }

  Status QueryProjection() const {
    const int64_t heads = dims_.heads, features = dims_.features;
    int64_t splits = 0;
    NearFarQueryProjectionParams<T> p;
    if (call_.attributes.projection_gradient) {
      splits = division_.splits.count;
      static_cast<NearFarStepsParams<T>&>(p) = steps_;
      p.grad_out = grad_out_;
      p.statistics = statistics_.far();
      PERFORMER_RETURN_IF_ERROR(Allocate(splits * heads * features, &p.part_feature_bias));
      PERFORMER_RETURN_IF_ERROR(
          Allocate(splits * heads * features * dims_.key_dim, &p.part_projection));
      PERFORMER_RETURN_IF_ERROR(division_.geometry.causal ? LaunchQueryProjection<false>(p)
                                                          : LaunchQueryProjection<true>(p));
    }
    return Base::SumQueryProjection(splits, p.part_projection, p.part_feature_bias);
  }

  template <bool kBoth>
  Status LaunchQueryProjection(const NearFarQueryProjectionParams<T>& p) const {
    using Layout = NearFarQueryProjectionLayout<T, W, kBoth>;
    return launcher_.Launch(
        "near and far query projection gradient", NearFarQueryProjectionKernel<T, W, kBoth>,
        {division_.splits.count, dims_.heads, context_.features_pad / kTile * kSlices<W>},
        Layout::kThreads, Layout::kBytes, p);
  }

  // Those of one direction.
  Status ReverseStates(bool backward, ReverseSide<T>* side) {
    using Layout = NearFarReverseLayout<T, W>;
    const int64_t splits = division_.splits.count;
    const FarSide<T>& states = backward ? steps_.after : steps_.before;
    NearFarReverseParams<T> p;
    static_cast<QueryParams<T>&>(p) = steps_;
    p.work = division_.splits.tiles;
    p.before_log_mass = states.log_mass;
    p.before_each = states.each;
    p.before_count = states.count;
    p.grad_out = grad_out_;
    p.statistics = statistics_.far();
    p.projection = steps_.projection;
    p.tiles = division_.blocks.tiles;
    p.feature_blocks = CeilDiv(dims_.features, Layout::kFeatures);
    p.tile_log_mass = states.checkpoints.log_mass;
    p.log_mass = backward ? log_mass_of_all_ : log_mass_;
    p.geometry = division_.geometry;
    p.backward = backward;
    p.log_features = steps_.log_features;
    PERFORMER_RETURN_IF_ERROR(Base::AllocateReverseStates(splits, division_.blocks.count, &p));
    side->checkpoints = p.checkpoints;
    PERFORMER_RETURN_IF_ERROR(launcher_.Launch(
        "near and far reverse states", NearFarReverseStatesKernel<T, W>,
        {splits * p.feature_blocks, dims_.groups}, Layout::kThreads, Layout::kBytes, p));
    return Base::MergeReverseStates(p, division_.splits, !backward, forward_.initial.mean,
                                    &side->after);
  }

  Status KeyGradients() {
    NearFarKeyGradientsParams<T> p;
    static_cast<CallParams&>(p) = steps_;
    p.keys = steps_.keys;
    PERFORMER_RETURN_IF_ERROR(Base::FillKeyGradients(&p));
    p.geometry = division_.geometry;
    p.query = steps_.query;
    p.grad_out = grad_out_;
    p.statistics = statistics_.near();
    p.before = before_;
    p.after = after_;
    PERFORMER_RETURN_IF_ERROR(division_.geometry.causal ? LaunchKeyGradients<false>(p)
                                                        : LaunchKeyGradients<true>(p));
    return KeyProjection(p);
  }

  template <bool kBoth>
  Status LaunchKeyGradients(const NearFarKeyGradientsParams<T>& p) const {
    using Layout = NearFarKeyLayout<T, W, kBoth>;
    return launcher_.Launch("near and far key gradients", NearFarKeyGradientsKernel<T, W, kBoth>,
                            {tiles(), dims_.groups, kSlices<W>}, Layout::kThreads, Layout::kBytes,
                            p);
  }

  Status KeyProjection(const NearFarKeyGradientsParams<T>& of_keys) const {
    int64_t splits = 0;
    NearFarKeyProjectionParams<T> p;
    if (call_.attributes.projection_gradient) {
      splits = division_.splits.count;
      static_cast<NearFarKeyGradientsParams<T>&>(p) = of_keys;
      PERFORMER_RETURN_IF_ERROR(
          Allocate(splits * dims_.groups * dims_.features * dims_.key_dim, &p.part_projection));
      PERFORMER_RETURN_IF_ERROR(division_.geometry.causal ? LaunchKeyProjection<false>(p)
                                                          : LaunchKeyProjection<true>(p));
    }
    return Base::SumKeyProjection(splits, p.part_projection);
  }

  template <bool kBoth>
  Status LaunchKeyProjection(const NearFarKeyProjectionParams<T>& p) const {
    using Layout = NearFarKeyLayout<T, W, kBoth>;
    return launcher_.Launch(
        "near and far key projection gradient", NearFarKeyProjectionKernel<T, W, kBoth>,
        {division_.splits.count, dims_.groups, context_.features_pad / Layout::kFeatures},
        Layout::kThreads, Layout::kBytes, p);
  }

  Status KeyBias() const {
    return Base::KeyBias([&](float* common) {
      NearFarCommonBiasParams p;
      p.geometry = division_.geometry;
      p.heads = dims_.heads;
      p.groups = dims_.groups;
      p.features = dims_.features;
      p.packed = context_.packed();
      p.bias = steps_.keys.bias;
      p.log_mass = log_mass_;
      p.grad_log_mass = static_cast<const float*>(call_.grad_state.log_mass);
      p.grad_initial_log_mass = grad_initial_log_mass_;
      p.log_weight = static_cast<const float*>(call_.log_weight);
      p.grad_log_weight = static_cast<const float*>(call_.grad_log_weight);
      p.common = common;
      return launcher_.Launch("gradient of key_bias", NearFarCommonBiasKernel,
                              {dims_.sequences, dims_.groups}, kCommonBiasThreads,
                              kCommonBiasThreads / 32 * static_cast<int>(sizeof(float)), p);
    });
  }

  performer::NearFarParams forward_;  // of the call; in float32 with values less their origins
  NearFarDivision division_;
  NearFarStepsParams<T> steps_;
  RowsOf<const T> grad_out_;
  const float* log_mass_of_all_ = nullptr;  // see LaunchFarStates
  NearFarOrigins origins_;
  NearFarStatistics statistics_;
  ReverseSide<T> before_, after_;
};

template <class T>
Status RunNearFarGrad(const performer::NearFarGradParams& call, const Device& device) {
  const Context context(call, device);
  return WithWidth<T>(call.dims, [&](auto width) {
    return NearFarGradLauncher<T, decltype(width)::value>(context, call).Run();
  });
}

}  // namespace cuda
}  // namespace performer
