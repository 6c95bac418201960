// Launcher of Causal: the state of each split, with checkpoints (split_states), the state before
// each split and the final one (merge), then all tiles side by side.
#pragma once
#include "cuda/host/operators.h"
#include "cuda/kernels/causal/causal.cuh"
#include "cuda/kernels/causal/split_states.cuh"
#include "cuda/kernels/forward/launch.cuh"

namespace performer {
namespace cuda {

// The forward pass as it has been launched. The gradient reads from it what it needs again: states
// before splits, operands, and the outputs before they are rounded.
template <class T>
struct CausalPass {
  Division splits, tiles;
  CausalParams<T> params;
};

// The states that splits begin with, which are the initial states or these merged with the splits
// before; checkpoints; and the final states.
template <class T, int W>
Status LaunchStates(const Context& context, const performer::CausalParams& call,
                    CausalPass<T>* pass) {
  using Layout = SplitStatesLayout<T, W>;
  const Launcher& launcher = context.launcher;
  const Division &splits = pass->splits, &tiles = pass->tiles;
  CausalParams<T>& params = pass->params;
  MergeParams merge = MakeMergeParams(context, splits);
  SplitStatesParams<T> p;
  PERFORMER_RETURN_IF_ERROR((FillSplitStates<T, W>(context, call.keys, splits, &p, &merge)));
  const int64_t checkpoints = tiles.count * context.dims.groups * context.features_pad;
  PERFORMER_RETURN_IF_ERROR(
      launcher.Allocate(checkpoints * W, "states of tiles", &p.checkpoints.mean));
  PERFORMER_RETURN_IF_ERROR(
      launcher.Allocate(checkpoints, "states of tiles", &p.checkpoints.log_mass));
  p.tiles = tiles.tiles;
  params.checkpoints = p.checkpoints;
  PERFORMER_RETURN_IF_ERROR(launcher.Launch("states of splits", SplitStatesKernel<T, W>,
                                            SplitStatesGrid<T, W>(context, splits),
                                            Layout::kThreads, Layout::kBytes, p));
  merge.initial_log_mass = static_cast<const float*>(call.initial.log_mass);
  merge.initial_mean = static_cast<const float*>(call.initial.mean);
  merge.initial_count = call.initial.count;
  merge.before = true;
  merge.log_mass = static_cast<float*>(call.state.log_mass);
  merge.mean = static_cast<float*>(call.state.mean);
  PERFORMER_RETURN_IF_ERROR(Merge(context, merge));
  params.before_each = splits.max_count > 1;
  params.before_count = call.initial.count;
  params.before_log_mass = params.before_each ? merge.part_log_mass : merge.initial_log_mass;
  params.before_mean = params.before_each ? merge.part_mean : merge.initial_mean;
  const int64_t before = (params.before_each ? splits.count : params.before_count);
  return Pack<T, W>(context, "states before splits", params.before_mean, params.before_log_mass,
                    before * context.dims.groups, context.dims.value_dim, &params.before_operand);
}

// The causal kernel and what goes before it. keep: the outputs stay in workspace before they are
// rounded (params.float_out and what its rows are relative to), and call.out is not written.
template <class T, int W>
Status CausalForward(const Context& context, const performer::CausalParams& call, bool keep,
                     CausalPass<T>* pass) {
  using Layout = CausalLayout<T, W>;
  const Dims& dims = context.dims;
  CausalParams<T>& p = pass->params;
  const Division& tiles = pass->tiles;
  PERFORMER_RETURN_IF_ERROR(context.Divide(dims.keys, kSplits, &pass->splits));
  PERFORMER_RETURN_IF_ERROR(context.Divide(dims.keys, kTile, &pass->tiles));
  PERFORMER_RETURN_IF_ERROR((LaunchStates<T, W>(context, call, pass)));
  PERFORMER_RETURN_IF_ERROR((PackProjection<T, W>(context, call.queries.projection,
                                                  call.queries.projection_heads, &p.projection)));
  PERFORMER_RETURN_IF_ERROR((PackOperands<T, W>(context, call.keys.projection,
                                                call.keys.projection_heads, &p.key_operands)));
  context.FillQueries(call.queries, tiles, &p);
  context.FillKeys(call.keys, &p.keys);
  p.splits = pass->splits.tiles;
  p.key_head_step = call.keys.projection_heads == 1 ? 0 : context.features_pad;
  p.out = MakeRows<T>(call.out, dims.heads, dims.value_dim);
  if (keep) {
    const int64_t rows = dims.batch * dims.queries * dims.heads;
    PERFORMER_RETURN_IF_ERROR(
        context.launcher.Allocate(rows * W, "unrounded outputs", &p.float_out));
    for (float** to : {&p.row_max, &p.log_sum})
      PERFORMER_RETURN_IF_ERROR(context.launcher.Allocate(rows, "unrounded outputs", to));
  }
  return context.launcher.Launch("causal", CausalKernel<T, W>, {tiles.count, dims.heads},
                                 Layout::kThreads, Layout::kBytes, p);
}

template <class T>
Status RunCausal(const performer::CausalParams& call, const Device& device) {
  const Context context(call, device);
  return WithWidth(call.dims, [&](auto width) {
    CausalPass<T> pass;
    return CausalForward<T, decltype(width)::value>(context, call, false, &pass);
  });
}

}  // namespace cuda
}  // namespace performer
