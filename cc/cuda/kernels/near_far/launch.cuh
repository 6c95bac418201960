// Launcher of NearFar: the states of splits, with checkpoints at blocks (block_states), those before
// each split and the final ones (merge), likewise in the other direction unless causal, then all
// tiles side by side.
#pragma once
#include "cuda/host/operators.h"
#include "cuda/kernels/forward/launch.cuh"
#include "cuda/kernels/near_far/block_states.cuh"
#include "cuda/kernels/near_far/near_far.cuh"

namespace performer {
namespace cuda {

// The blocks and splits of a call.
struct NearFarDivision {
  Division blocks, splits;
  NearFarGeometry geometry;
  bool any_final = false;  // whether the final state may have keys of the call
};

inline Status DivideNearFar(const Context& context, const performer::NearFarParams& call,
                            NearFarDivision* division) {
  const Dims& dims = context.dims;
  NearFarGeometry& geometry = division->geometry;
  geometry.window = call.attributes.exact_window;
  geometry.phase = call.start % geometry.window;
  geometry.queries = dims.queries;
  geometry.keys = dims.keys;
  geometry.causal = call.attributes.causal;
  const int64_t positions = dims.keys == 0 ? 0 : geometry.phase + dims.keys;
  PERFORMER_RETURN_IF_ERROR(context.Divide(positions, geometry.window, &division->blocks));
  PERFORMER_RETURN_IF_ERROR(context.Divide(positions, kSplits, &division->splits, geometry.window));
  geometry.blocks = division->blocks.tiles;
  geometry.splits = division->splits.tiles;
  division->any_final = !geometry.causal || context.packed() ||
                        NearFarFinalBlocks(geometry.phase, dims.keys, geometry.window) > 0;
  return Status();
}

// Summarizes the splits in one direction: fills the checkpoints, and what merging needs.
template <class T, int W>
Status LaunchBlockStates(const Context& context, const NearFarDivision& division, bool backward,
                         BlockStatesParams<T>* params, Checkpoints<T>* checkpoints) {
  using Layout = BlockStatesLayout<T, W>;
  const Launcher& launcher = context.launcher;
  const int64_t rows = division.blocks.count * context.dims.groups * context.features_pad;
  PERFORMER_RETURN_IF_ERROR(launcher.Allocate(rows * W, "states of blocks", &checkpoints->mean));
  PERFORMER_RETURN_IF_ERROR(launcher.Allocate(rows, "states of blocks", &checkpoints->log_mass));
  params->geometry = division.geometry;
  params->backward = backward;
  params->checkpoints = *checkpoints;
  return launcher.Launch("states of blocks", BlockStatesKernel<T, W>,
                         SplitStatesGrid<T, W>(context, division.splits), Layout::kThreads,
                         Layout::kBytes, *params);
}

// The states that splits begin with, as operands.
template <class T, int W>
Status PackSide(const Context& context, const MergeParams& merge, int64_t splits, int64_t count,
                FarSide<T>* side) {
  side->each = merge.before;
  side->count = count;
  side->log_mass = merge.before ? merge.part_log_mass : merge.initial_log_mass;
  return Pack<T, W>(context, "states before splits",
                    merge.before ? merge.part_mean : merge.initial_mean, side->log_mass,
                    (merge.before ? splits : count) * context.dims.groups, context.dims.value_dim,
                    &side->operand);
}

// The states of far keys before and behind the blocks, and the final state. log_mass_of_all: where
// it is not nullptr, and there are states behind blocks, it becomes that of all keys of a sequence
// [N, G, M], without the initial state.
template <class T, int W>
Status LaunchFarStates(const Context& context, const performer::NearFarParams& call,
                       const NearFarDivision& division, NearFarStepsParams<T>* params,
                       const float** log_mass_of_all = nullptr) {
  const Launcher& launcher = context.launcher;
  const Dims& dims = context.dims;
  const Division& splits = division.splits;
  MergeParams merge = MakeMergeParams(context, splits);
  merge.initial_log_mass = static_cast<const float*>(call.initial.log_mass);
  merge.initial_mean = static_cast<const float*>(call.initial.mean);
  merge.initial_count = call.initial.count;
  merge.log_mass = static_cast<float*>(call.state.log_mass);
  merge.mean = static_cast<float*>(call.state.mean);
  BlockStatesParams<T> p;
  if (division.any_final) {
    PERFORMER_RETURN_IF_ERROR((FillSplitStates<T, W>(context, call.keys, splits, &p, &merge)));
    PERFORMER_RETURN_IF_ERROR(
        (LaunchBlockStates<T, W>(context, division, false, &p, &params->before.checkpoints)));
    merge.before = splits.max_count > 1;
    PERFORMER_RETURN_IF_ERROR(Merge(context, merge));
  } else if (call.state.log_mass != call.initial.log_mass) {
    // The final states are the initial ones. (They may have the same memory.)
    merge.splits.rows = 0;
    PERFORMER_RETURN_IF_ERROR(Merge(context, merge));
  }
  PERFORMER_RETURN_IF_ERROR(
      (PackSide<T, W>(context, merge, splits.count, call.initial.count, &params->before)));
  if (division.geometry.causal || division.blocks.max_count <= 2) return Status();

  // The same in the other direction, from nothing. The state of all keys is known.
  const int64_t parts = splits.count * dims.groups * dims.features;
  const int64_t sums = dims.sequences * dims.groups * dims.features;
  MergeParams after = MakeMergeParams(context, splits);
  PERFORMER_RETURN_IF_ERROR(launcher.Allocate(parts, "states of splits", &after.part_log_mass));
  PERFORMER_RETURN_IF_ERROR(
      launcher.Allocate(parts * dims.value_dim, "states of splits", &after.part_mean));
  p.log_mass = after.part_log_mass;
  p.mean = after.part_mean;
  PERFORMER_RETURN_IF_ERROR(
      (LaunchBlockStates<T, W>(context, division, true, &p, &params->after.checkpoints)));
  after.before = splits.max_count > 1;
  if (!after.before && log_mass_of_all == nullptr) return Status();
  PERFORMER_RETURN_IF_ERROR(launcher.Allocate(sums, "states of splits", &after.log_mass));
  PERFORMER_RETURN_IF_ERROR(
      launcher.Allocate(sums * dims.value_dim, "states of splits", &after.mean));
  PERFORMER_RETURN_IF_ERROR(Merge(context, after));
  if (log_mass_of_all != nullptr) *log_mass_of_all = after.log_mass;
  if (!after.before) return Status();
  return PackSide<T, W>(context, after, splits.count, 0, &params->after);
}

template <class T, int W, bool kBoth>
Status LaunchNearFar(const Context& context, const NearFarDivision& division,
                     const NearFarParams<T>& params) {
  using Layout = NearFarLayout<T, W, kBoth>;
  const int64_t tiles = division.blocks.count * CeilDiv(division.geometry.window, kTile);
  return context.launcher.Launch("near and far", NearFarKernel<T, W, kBoth>,
                                 {tiles, context.dims.heads}, Layout::kThreads, Layout::kBytes,
                                 params);
}

// What a kernel that walks features and near keys is given of the call, but for the states.
template <class T, int W>
Status FillSteps(const Context& context, const performer::NearFarParams& call,
                 const NearFarDivision& division, NearFarStepsParams<T>* params) {
  context.FillQueries(call.queries, division.blocks, params);
  context.FillKeys(call.keys, &params->keys);
  params->geometry = division.geometry;
  params->query_norm = call.attributes.query_norm;
  params->log_features = static_cast<float>(std::log(static_cast<double>(context.dims.features)));
  return PackProjection<T, W>(context, call.queries.projection, call.queries.projection_heads,
                              &params->projection);
}

template <class T, int W>
Status NearFar(const Context& context, const performer::NearFarParams& call) {
  const Dims& dims = context.dims;
  NearFarDivision division;
  NearFarParams<T> p;
  PERFORMER_RETURN_IF_ERROR(DivideNearFar(context, call, &division));
  PERFORMER_RETURN_IF_ERROR((LaunchFarStates<T, W>(context, call, division, &p)));
  PERFORMER_RETURN_IF_ERROR((FillSteps<T, W>(context, call, division, &p)));
  p.out = MakeRows<T>(call.out, dims.heads, dims.value_dim);
  p.log_weight = static_cast<float*>(call.log_weight);
  if (dims.queries == 0) return Status();
  return division.geometry.causal ? LaunchNearFar<T, W, false>(context, division, p)
                                  : LaunchNearFar<T, W, true>(context, division, p);
}

template <class T>
Status RunNearFar(const performer::NearFarParams& call, const Device& device) {
  const Context context(call, device);
  return WithWidth<T>(
      call.dims, [&](auto width) { return NearFar<T, decltype(width)::value>(context, call); });
}

}  // namespace cuda
}  // namespace performer
