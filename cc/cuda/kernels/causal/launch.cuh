// Launcher of Causal: the state of each split, with checkpoints (split_states), the state before
// each split and the final one (merge), then all tiles side by side.
#pragma once
#include "cuda/host/operators.h"
#include "cuda/kernels/causal/causal.cuh"
#include "cuda/kernels/causal/split_states.cuh"
#include "cuda/kernels/forward/launch.cuh"

namespace performer {
namespace cuda {

// What all kernels of causal tiles start from, in the forward pass and in the gradient: states before
// splits and tiles, and operands.
template <class T>
struct CausalPass {
  Division splits, tiles, means;
  CausalTileParams<T> params;
};

// The states that splits begin with, which are the initial states or these merged with the splits
// before; checkpoints; and the final states.
template <class T, int W>
Status LaunchStates(const Context& context, const performer::CausalParams& call,
                    CausalPass<T>* pass) {
  using Layout = SplitStatesLayout<T, W>;
  const Launcher& launcher = context.launcher;
  const Division &splits = pass->splits, &tiles = pass->tiles;
  CausalTileParams<T>& params = pass->params;
  MergeParams merge = MakeMergeParams(context, splits);
  SplitStatesParams<T> p;
  PERFORMER_RETURN_IF_ERROR((FillSplitStates<T, W>(context, call.keys, splits, &p, &merge)));
  const int64_t each = context.dims.groups * context.features_pad;
  PERFORMER_RETURN_IF_ERROR(
      launcher.Allocate(pass->means.count * each * W, "states of tiles", &p.checkpoints.mean));
  PERFORMER_RETURN_IF_ERROR(
      launcher.Allocate(tiles.count * each, "states of tiles", &p.checkpoints.log_mass));
  p.tiles = tiles.tiles;
  p.means = pass->means.tiles;
  params.checkpoints = p.checkpoints;
  PERFORMER_RETURN_IF_ERROR(launcher.Launch("states of splits", SplitStatesKernel<T, W>,
                                            SplitStatesGrid<T, W>(context, splits),
                                            Layout::kThreads, Layout::kBytes, p));
  merge.initial_log_mass = static_cast<const float*>(call.initial.log_mass);
  merge.initial_mean = static_cast<const float*>(call.initial.mean);
  merge.initial_count = call.initial.count;
  merge.log_mass = static_cast<float*>(call.state.log_mass);
  merge.mean = static_cast<float*>(call.state.mean);
  params.before_each = splits.max_count > 1;
  params.before_count = call.initial.count;
  params.before_log_mass = params.before_each ? merge.part_log_mass : merge.initial_log_mass;
  if (!params.before_each) {
    PERFORMER_RETURN_IF_ERROR(Merge(context, merge));
    return Pack<T, W>(context, "states before splits", merge.initial_mean, merge.initial_log_mass,
                      call.initial.count * context.dims.groups, context.dims.value_dim,
                      &params.before_operand);
  }
  T* operand = nullptr;
  PERFORMER_RETURN_IF_ERROR(
      launcher.Allocate(splits.count * context.dims.groups * context.features_pad * W,
                        "states before splits", &operand));
  params.before_operand = operand;
  merge.before = true;
  merge.operand = operand;
  merge.features_pad = context.features_pad;
  merge.operand_width = W;
  return Merge<T>(context, merge);
}

// What goes before the kernels of tiles. rows_of_mean: see CausalTileParams::means.
template <class T, int W>
Status PrepareCausal(const Context& context, const performer::CausalParams& call,
                     int64_t rows_of_mean, CausalPass<T>* pass) {
  CausalTileParams<T>& p = pass->params;
  PERFORMER_RETURN_IF_ERROR(context.Divide(context.dims.keys, kSplits, &pass->splits));
  PERFORMER_RETURN_IF_ERROR(context.Divide(context.dims.keys, kTile, &pass->tiles));
  pass->means = pass->tiles;
  if (rows_of_mean != kTile)
    PERFORMER_RETURN_IF_ERROR(context.Divide(context.dims.keys, rows_of_mean, &pass->means));
  PERFORMER_RETURN_IF_ERROR((LaunchStates<T, W>(context, call, pass)));
  PERFORMER_RETURN_IF_ERROR((PackProjection<T, W>(context, call.queries.projection,
                                                  call.queries.projection_heads, &p.projection)));
  PERFORMER_RETURN_IF_ERROR((PackOperands<T, W>(context, call.keys.projection,
                                                call.keys.projection_heads, &p.key_operands)));
  context.FillQueries(call.queries, pass->tiles, &p);
  context.FillKeys(call.keys, &p.keys);
  p.splits = pass->splits.tiles;
  p.means = pass->means.tiles;
  p.key_head_step = call.keys.projection_heads == 1 ? 0 : context.features_pad;
  return Status();
}

template <class T, int W>
Status Causal(const Context& context, const performer::CausalParams& call) {
  using Layout = CausalLayout<T, W>;
  CausalPass<T> pass;
  PERFORMER_RETURN_IF_ERROR((PrepareCausal<T, W>(context, call, kTile, &pass)));
  CausalParams<T> p;
  static_cast<CausalTileParams<T>&>(p) = pass.params;
  p.out = MakeRows<T>(call.out, context.dims.heads, context.dims.value_dim);
  return context.launcher.Launch("causal", CausalKernel<T, W>,
                                 {pass.tiles.count, context.dims.heads}, Layout::kThreads,
                                 Layout::kBytes, p);
}

template <class T>
Status RunCausal(const performer::CausalParams& call, const Device& device) {
  const Context context(call, device);
  return WithWidth<T>(call.dims,
                      [&](auto width) { return Causal<T, decltype(width)::value>(context, call); });
}

}  // namespace cuda
}  // namespace performer
