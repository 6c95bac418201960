// Launchers of the bidirectional operators, Summarize and Read.
#pragma once
#include "cuda/host/operators.h"
#include "cuda/kernels/forward/merge_states.cuh"
#include "cuda/kernels/forward/prepare.cuh"
#include "cuda/kernels/forward/read.cuh"
#include "cuda/kernels/forward/summarize.cuh"

namespace performer {
namespace cuda {

// What merging takes from the call.
inline MergeParams MakeMergeParams(const Context& context, const Division& splits) {
  MergeParams params;
  params.splits = splits.tiles;
  params.groups = context.dims.groups;
  params.features = params.features_pad = context.dims.features;
  params.width = static_cast<int>(context.dims.value_dim);
  return params;
}

// T: of the operands, if there are any.
template <class T = float>
Status Merge(const Context& context, const MergeParams& params) {
  const int64_t rows = params.splits.sequences * params.groups * params.features_pad;
  return context.launcher.Launch("merge", MergeKernel<T>, {CeilDiv(rows * 32, kElementwiseThreads)},
                                 kElementwiseThreads, 0, params);
}

// Fills the parameters of a kernel that writes the state of each split to workspace, where `merge`
// finds it.
template <class T, int W>
Status FillSplitStates(const Context& context, const KeySide& keys, const Division& splits,
                       SummarizeParams<T>* params, MergeParams* merge) {
  const Dims& dims = context.dims;
  const int64_t features = splits.count * dims.groups * dims.features;
  SummarizeParams<T>& p = *params;
  PERFORMER_RETURN_IF_ERROR((FillKeyRead<T, W>(context, keys, splits, &p)));
  PERFORMER_RETURN_IF_ERROR(context.launcher.Allocate(features, "states of splits", &p.log_mass));
  PERFORMER_RETURN_IF_ERROR(
      context.launcher.Allocate(features * dims.value_dim, "states of splits", &p.mean));
  merge->part_log_mass = p.log_mass;
  merge->part_mean = p.mean;
  return Status();
}

// The grid of that kernel.
template <class T, int W>
Grid SplitStatesGrid(const Context& context, const Division& splits) {
  return {splits.count, context.dims.groups,
          CeilDiv(context.dims.features, SummarizeTraits<T, W>::kFeatures)};
}

template <class T, int W>
Status Summarize(const Context& context, const performer::SummarizeParams& call) {
  using Traits = SummarizeTraits<T, W>;
  Division splits;
  PERFORMER_RETURN_IF_ERROR(context.Divide(context.dims.keys, kSplits, &splits));
  MergeParams merge = MakeMergeParams(context, splits);
  SummarizeParams<T> p;
  PERFORMER_RETURN_IF_ERROR((FillSplitStates<T, W>(context, call.keys, splits, &p, &merge)));
  PERFORMER_RETURN_IF_ERROR(context.launcher.Launch("summarize", SummarizeKernel<T, W>,
                                                    SplitStatesGrid<T, W>(context, splits),
                                                    Traits::kThreads, Traits::kBytes, p));
  merge.log_mass = static_cast<float*>(call.state.log_mass);
  merge.mean = static_cast<float*>(call.state.mean);
  return Merge(context, merge);
}

template <class T, int W>
Status Read(const Context& context, const performer::ReadParams& call) {
  using Traits = ReadTraits<T, W>;
  const Dims& dims = context.dims;
  Division tiles;
  PERFORMER_RETURN_IF_ERROR(context.Divide(dims.queries, Traits::kRows, &tiles));
  ReadParams<T> p;
  PERFORMER_RETURN_IF_ERROR((FillStateRead<T, W>(context, call.queries, call.state, tiles, &p)));
  p.out = MakeRows<T>(call.out, dims.heads, dims.value_dim);
  return context.launcher.Launch("read", ReadKernel<T, W>, {tiles.count, dims.heads},
                                 Traits::kThreads, Traits::kBytes, p);
}

template <class T>
Status RunSummarize(const performer::SummarizeParams& call, const Device& device) {
  const Context context(call, device);
  return WithWidth<T>(
      call.dims, [&](auto width) { return Summarize<T, decltype(width)::value>(context, call); });
}

template <class T>
Status RunRead(const performer::ReadParams& call, const Device& device) {
  const Context context(call, device);
  return WithWidth<T>(call.dims,
                      [&](auto width) { return Read<T, decltype(width)::value>(context, call); });
}

}  // namespace cuda
}  // namespace performer
