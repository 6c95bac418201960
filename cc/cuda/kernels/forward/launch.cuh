// Launchers of the bidirectional operators, Summarize and Read.
#pragma once
#include "cuda/host/context.h"
#include "cuda/kernels/forward/merge_states.cuh"
#include "cuda/kernels/forward/read.cuh"
#include "cuda/kernels/forward/summarize.cuh"

namespace performer {
namespace cuda {

inline Status Merge(const Launcher& launcher, const MergeParams& params) {
  constexpr int kThreads = 256;
  const int64_t rows = params.splits.sequences * params.groups * params.features;
  return launcher.Launch("merge", MergeKernel, {CeilDiv(rows * 32, kThreads)}, kThreads, 0, params);
}

template <class T, int W>
class Forward : public Operands<T> {
 public:
  using Operands<T>::Operands;

  Status Summarize(const performer::SummarizeParams& params) const {
    Division splits;
    PERFORMER_RETURN_IF_ERROR(this->Divide(dims_.keys, kSplits, &splits));
    MergeParams merge;
    PERFORMER_RETURN_IF_ERROR(SummarizeSplits(params.keys, splits, false, &merge));
    merge.log_mass = static_cast<float*>(params.state.log_mass);
    merge.mean = static_cast<float*>(params.state.mean);
    return Merge(launcher_, merge);
  }

  Status Read(const performer::ReadParams& call) const {
    using Traits = ReadTraits<T, W>;
    ReadParams<T> p;
    Division tiles;
    PERFORMER_RETURN_IF_ERROR(this->Divide(dims_.queries, Traits::kRows, &tiles));
    p.tiles = tiles.tiles;
    PERFORMER_RETURN_IF_ERROR(this->template PackProjection<W>(
        call.queries.projection, call.queries.projection_heads, &p.projection));
    p.log_mass = static_cast<const float*>(call.state.log_mass);
    PERFORMER_RETURN_IF_ERROR(this->template Pack<W>("the packed mean", call.state.mean, p.log_mass,
                                                     call.state.count * dims_.groups,
                                                     dims_.value_dim, &p.mean));
    p.query = InputRows<T>(call.queries.query, dims_.heads, dims_.key_dim);
    p.feature_bias = static_cast<const float*>(call.queries.feature_bias);
    p.feature_bias_heads = call.queries.feature_bias_heads;
    p.state_count = call.state.count;
    p.map = map_;
    p.groups = dims_.groups;
    p.features = dims_.features;
    p.features_pad = this->features_pad_;
    p.out = OutputRows<T>(call.out, dims_.heads, dims_.value_dim);
    return launcher_.Launch("read", ReadKernel<T, W>, {tiles.count, dims_.heads}, Traits::kThreads,
                            Traits::kBytes, p);
  }

 protected:
  using Operands<T>::dims_;
  using Operands<T>::launcher_;
  using Operands<T>::map_;

  // The states of splits, in workspace: what merge needs of them.
  Status SummarizeSplits(const KeySide& keys, const Division& splits, bool skip_last,
                         MergeParams* merge) const {
    using Traits = SummarizeTraits<T, W>;
    const int64_t features = splits.count * dims_.groups * dims_.features;
    SummarizeParams<T> p;
    PERFORMER_RETURN_IF_ERROR(launcher_.Allocate(features, "states of splits", &p.log_mass));
    PERFORMER_RETURN_IF_ERROR(
        launcher_.Allocate(features * dims_.value_dim, "states of splits", &p.mean));
    PERFORMER_RETURN_IF_ERROR(
        this->template PackProjection<W>(keys.projection, keys.projection_heads, &p.projection));
    p.keys = MakeKeyParams<T>(this->call_, keys);
    p.map = map_;
    p.splits = splits.tiles;
    p.skip_last = skip_last;
    p.groups = dims_.groups;
    p.features = dims_.features;
    p.features_pad = this->features_pad_;
    merge->splits = splits.tiles;
    merge->groups = dims_.groups;
    merge->features = dims_.features;
    merge->width = static_cast<int>(dims_.value_dim);
    merge->part_log_mass = p.log_mass;
    merge->part_mean = p.mean;
    const Grid grid = {splits.count, dims_.groups, CeilDiv(dims_.features, Traits::kFeatures)};
    return launcher_.Launch("summarize", SummarizeKernel<T, W>, grid, Traits::kThreads,
                            Traits::kBytes, p);
  }
};

}  // namespace cuda
}  // namespace performer
