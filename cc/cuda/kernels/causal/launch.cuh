// Launcher of Causal. Where a sequence has several splits: the state of each split (summarize), the
// state before each (merge), then all splits side by side.
#pragma once
#include "cuda/host/operators.h"
#include "cuda/kernels/causal/causal.cuh"
#include "cuda/kernels/causal/merge_outputs.cuh"
#include "cuda/kernels/forward/launch.cuh"

namespace performer {
namespace cuda {

// The forward pass as it has been launched. The gradient reads from it what it needs again: states
// before splits, operands, and the outputs of the feature blocks.
template <class T>
struct CausalPass {
  Division splits;
  CausalParams<T> params;
  int64_t feature_blocks = 0;
};

inline MergeParams MakeInitialMergeParams(const Context& context, const Division& splits,
                                          const State& initial) {
  MergeParams params = MakeMergeParams(context, splits);
  params.initial_log_mass = static_cast<const float*>(initial.log_mass);
  params.initial_mean = static_cast<const float*>(initial.mean);
  params.initial_count = initial.count;
  return params;
}

// The states that splits begin with: the initial states, or these merged with the splits before.
template <class T, int W>
Status PrepareStatesBefore(const Context& context, const performer::CausalParams& call,
                           const Division& splits, CausalParams<T>* params) {
  MergeParams merge = MakeInitialMergeParams(context, splits, call.initial);
  params->before_log_mass = merge.initial_log_mass;
  params->before_mean = merge.initial_mean;
  params->before_count = merge.initial_count;
  if (splits.max_count <= 1) return Status();
  PERFORMER_RETURN_IF_ERROR((SummarizeSplits<T, W>(context, call.keys, splits, true, &merge)));
  PERFORMER_RETURN_IF_ERROR(Merge(context, merge));
  params->before_log_mass = merge.part_log_mass;
  params->before_mean = merge.part_mean;
  params->before_each = true;
  return Status();
}

// Sequences without rows have no block: their final state is the initial one.
inline Status WriteStatesOfEmptySequences(const Context& context,
                                          const performer::CausalParams& call,
                                          const Division& splits) {
  if (!splits.some_empty) return Status();
  MergeParams merge = MakeInitialMergeParams(context, splits, call.initial);
  merge.log_mass = static_cast<float*>(call.state.log_mass);
  merge.mean = static_cast<float*>(call.state.mean);
  merge.only_empty = true;
  return Merge(context, merge);
}

template <class T, int W, int kFeatureTiles, bool kSmall>
Status LaunchCausalKernel(const Context& context, bool keep_parts, CausalPass<T>* pass) {
  using Layout = CausalLayout<T, W, kFeatureTiles, kSmall>;
  const Dims& dims = context.dims;
  CausalParams<T>& p = pass->params;
  pass->feature_blocks = CeilDiv(dims.features, Layout::kFeatures);
  if (pass->feature_blocks > 1 || keep_parts) {
    p.part_rows = dims.batch * dims.queries * dims.heads;
    p.part_size = p.part_rows * W;
    PERFORMER_RETURN_IF_ERROR(context.launcher.Allocate(pass->feature_blocks * p.part_size,
                                                        "partial outputs", &p.part_out));
    for (float** to : {&p.row_max, &p.log_sum})
      PERFORMER_RETURN_IF_ERROR(
          context.launcher.Allocate(pass->feature_blocks * p.part_rows, "partial outputs", to));
  }
  const Grid grid = {pass->splits.count, dims.heads, pass->feature_blocks};
  return context.launcher.Launch("causal", CausalKernel<T, W, kFeatureTiles, kSmall>, grid,
                                 Layout::kThreads, Layout::kBytes, p);
}

// The causal kernel and what goes before it. With keep_parts, or where features need several
// blocks, the outputs stay in workspace (params.part_out and what its rows are
// relative to): they are normalised in each
// feature block, and neither merged nor rounded.
template <class T, int W>
Status CausalForward(const Context& context, const performer::CausalParams& call, bool keep_parts,
                     CausalPass<T>* pass) {
  const Dims& dims = context.dims;
  PERFORMER_RETURN_IF_ERROR(context.Divide(dims.keys, kSplits, &pass->splits));
  CausalParams<T>& p = pass->params;
  PERFORMER_RETURN_IF_ERROR((PrepareStatesBefore<T, W>(context, call, pass->splits, &p)));
  PERFORMER_RETURN_IF_ERROR(WriteStatesOfEmptySequences(context, call, pass->splits));
  PERFORMER_RETURN_IF_ERROR((PackProjection<T, W>(context, call.queries.projection,
                                                  call.queries.projection_heads, &p.projection)));
  PERFORMER_RETURN_IF_ERROR((PackOperands<T, W>(context, call.keys.projection,
                                                call.keys.projection_heads, &p.key_operands)));
  context.FillQueries(call.queries, pass->splits, &p);
  context.FillKeys(call.keys, &p.keys);
  p.key_head_step = call.keys.projection_heads == 1 ? 0 : context.features_pad;
  p.operand_row = W * static_cast<int64_t>(sizeof(T)) / 4;
  p.out = MakeRows<T>(call.out, dims.heads, dims.value_dim);
  p.log_mass = static_cast<float*>(call.state.log_mass);
  p.mean = static_cast<float*>(call.state.mean);
  if constexpr (W == 64)
    if (context.launcher.HasSmallBlocks())
      return LaunchCausalKernel<T, W, 1, true>(context, keep_parts, pass);
  if constexpr (kIs16Bit<T> && W == 64)
    if (dims.features > CausalLayout<T, W, 1, false>::kFeatures)
      return LaunchCausalKernel<T, W, 2, false>(context, keep_parts, pass);
  return LaunchCausalKernel<T, W, 1, false>(context, keep_parts, pass);
}

template <class T, int W>
Status Causal(const Context& context, const performer::CausalParams& call) {
  CausalPass<T> pass;
  PERFORMER_RETURN_IF_ERROR((CausalForward<T, W>(context, call, false, &pass)));
  if (pass.feature_blocks == 1) return Status();
  MergeOutputsParams<T> p;
  p.part_out = pass.params.part_out;
  p.row_max = pass.params.row_max;
  p.log_sum = pass.params.log_sum;
  p.unit = pass.params.map.unit();
  p.parts = pass.feature_blocks;
  p.rows = context.dims.batch * context.dims.queries;
  p.out = pass.params.out;
  return context.launcher.Launch("merge outputs", MergeOutputsKernel<T, W>,
                                 {CeilDiv(pass.params.part_rows * 32, kElementwiseThreads)},
                                 kElementwiseThreads, 0, p);
}

template <class T>
Status RunCausal(const performer::CausalParams& call, const Device& device) {
  const Context context(call, device);
  return WithWidth(call.dims,
                   [&](auto width) { return Causal<T, decltype(width)::value>(context, call); });
}

}  // namespace cuda
}  // namespace performer
