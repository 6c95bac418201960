// What the launchers of the gradients of Causal and NearFar share: the states of the call and their
// gradients, reverse states, and sums of partial results.
#pragma once
#include "cuda/kernels/backward/gradients.h"
#include "cuda/kernels/causal_backward/reverse_states.cuh"
#include "cuda/kernels/forward/prepare.cuh"

namespace performer {
namespace cuda {

// GradCall: performer::CausalGradParams or NearFarGradParams.
template <class T, int W, class GradCall>
class StateGradLauncher {
 protected:
  StateGradLauncher(const Context& context, const GradCall& call)
      : context_(context), dims_(context.dims), launcher_(context.launcher), call_(call) {}

  template <class Number>
  Status Allocate(int64_t count, Number** to) const {
    return launcher_.Allocate(count, "gradients", to);
  }

  // [N, G, M], elements.
  int64_t state_size() const { return dims_.sequences * dims_.groups * dims_.features; }

  // The forward pass of the call, with final states in workspace. forward: a performer::CausalParams
  // or NearFarParams.
  template <class Forward>
  Status AllocateStates(Forward* forward) {
    static_cast<Common&>(*forward) = call_;
    forward->queries = call_.queries;
    forward->keys = call_.keys;
    forward->initial = call_.initial;
    PERFORMER_RETURN_IF_ERROR(Allocate(state_size(), &log_mass_));
    PERFORMER_RETURN_IF_ERROR(Allocate(state_size() * dims_.value_dim, &mean_));
    forward->state = {log_mass_, mean_};
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

  // Those of the query projection and of feature_bias, of partial results [splits, H, M(, D)].
  // `splits` is 0 where they are not asked for: sums of no terms.
  Status SumQueryProjection(int64_t splits, const float* part_projection,
                            const float* part_feature_bias) const {
    const QueryGradients& to = call_.grad_queries;
    PERFORMER_RETURN_IF_ERROR(
        SumHeads(context_, splits, dims_.heads, call_.queries.projection_heads,
                 dims_.features * dims_.key_dim, part_projection, to.projection));
    return SumHeads(context_, splits, dims_.heads, call_.queries.feature_bias_heads, dims_.features,
                    part_feature_bias, to.feature_bias);
  }

  // That of the key projection, of partial results [splits, G, M, D]; likewise.
  Status SumKeyProjection(int64_t splits, const float* part) const {
    return SumHeads(context_, splits, dims_.groups, call_.keys.projection_heads,
                    dims_.features * dims_.key_dim, part, call_.grad_keys.projection);
  }

  // Allocates the reverse states of splits, and checkpoints that are as many.
  Status AllocateReverseStates(int64_t splits, int64_t checkpoints,
                               ReverseStatesParams<T>* p) const {
    const int64_t states = splits * dims_.groups * dims_.features;
    const int64_t rows = checkpoints * dims_.groups * context_.features_pad;
    PERFORMER_RETURN_IF_ERROR(Allocate(rows * W, &p->checkpoints.sum));
    PERFORMER_RETURN_IF_ERROR(Allocate(rows * kReverseNumbers, &p->checkpoints.numbers));
    PERFORMER_RETURN_IF_ERROR(Allocate(states, &p->part_mass));
    return Allocate(states * dims_.value_dim, &p->part_mean);
  }

  // The reverse states after splits. with_ends: in the direction from the initial state to the final
  // one, with initial means as the kernels took them.
  Status MergeReverseStates(const ReverseStatesParams<T>& states, const Division& splits,
                            bool with_ends, const void* initial_mean, StatesAfterSplits* to) const {
    using N = ReverseNumber<T>;
    const int64_t rows = dims_.groups * context_.features_pad;
    N* after = nullptr;
    MergeReverseStatesParams p;
    PERFORMER_RETURN_IF_ERROR(Allocate(splits.count * rows * W, &after));
    PERFORMER_RETURN_IF_ERROR(Allocate(splits.count * rows * kAfterNumbers, &p.after.numbers));
    p.after.sum = after;
    p.splits = splits.tiles;
    p.groups = dims_.groups;
    p.features = dims_.features;
    p.features_pad = context_.features_pad;
    p.width = static_cast<int>(dims_.value_dim);
    p.padded_width = W;
    p.inverse_root = context_.map.inverse_root;
    p.part_mean = states.part_mean;
    p.part_mass = states.part_mass;
    p.before_log_mass = states.before_log_mass;
    p.before_each = states.before_each;
    p.log_mass = states.log_mass;
    p.origin = states.origin;
    if (with_ends) {
      p.mean = mean_;
      p.grad_log_mass = static_cast<const float*>(call_.grad_state.log_mass);
      p.grad_mean = static_cast<const float*>(call_.grad_state.mean);
      p.initial_log_mass = static_cast<const float*>(call_.initial.log_mass);
      p.initial_mean = static_cast<const float*>(initial_mean);
      p.initial_count = call_.initial.count;
      p.grad_initial_log_mass = grad_initial_log_mass_;
      p.grad_initial_mean = grad_initial_mean_;
    }
    *to = p.after;
    return launcher_.Launch("merge reverse states", MergeReverseStatesKernel<N>,
                            {CeilDiv(dims_.sequences * rows * 32, kElementwiseThreads)},
                            kElementwiseThreads, 0, p);
  }

  // What a kernel of key gradients writes, and the projection of keys.
  template <class Params>
  Status FillKeyGradients(Params* p) {
    PERFORMER_RETURN_IF_ERROR((PackProjection<T, W>(context_, call_.keys.projection,
                                                    call_.keys.projection_heads, &p->projection)));
    PERFORMER_RETURN_IF_ERROR(
        AllocateBias(context_, call_.keys, call_.grad_keys.bias, &grad_bias_));
    p->grad_key = MakeRows<T>(call_.grad_keys.key, dims_.groups, dims_.key_dim);
    p->grad_value = MakeRows<T>(call_.grad_keys.value, dims_.groups, dims_.value_dim);
    p->grad_bias = grad_bias_;
    p->bias_rows = dims_.keys;
    return Status();
  }

  // The gradient of key_bias. launch_common(common) enqueues that of a bias that is common to all
  // keys, [N, G, M].
  template <class LaunchCommon>
  Status KeyBias(LaunchCommon launch_common) const {
    float* common = nullptr;
    if (call_.keys.bias_length != dims_.keys) {
      PERFORMER_RETURN_IF_ERROR(Allocate(state_size(), &common));
      PERFORMER_RETURN_IF_ERROR(launch_common(common));
    }
    return SumBias(context_, call_.keys, grad_bias_, common, call_.grad_keys.bias);
  }

  const Context& context_;
  const Dims& dims_;
  const Launcher& launcher_;
  const GradCall& call_;
  float* log_mass_ = nullptr;               // [N, G, M]: the final state
  float* mean_ = nullptr;                   // [N, G, M, E]
  float* grad_initial_log_mass_ = nullptr;  // [N, G, M]
  float* grad_initial_mean_ = nullptr;      // [N, G, M, E]

 private:
  float* grad_bias_ = nullptr;  // [B, G, S] or nullptr
};

}  // namespace cuda
}  // namespace performer
