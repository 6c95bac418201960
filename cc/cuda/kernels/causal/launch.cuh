// Launcher of Causal. Where a sequence has several splits: their states (summarize), the state
// before each (merge), then all splits side by side.
#pragma once
#include "cuda/kernels/causal/causal.cuh"
#include "cuda/kernels/causal/merge_outputs.cuh"
#include "cuda/kernels/forward/launch.cuh"

namespace performer {
namespace cuda {

// What the gradient needs of the forward pass: normalised outputs of each group of features, not
// merged yet, the states that splits begin with (as CausalParams), and what it has packed.
template <class T>
struct CausalParts {
  Division splits;
  Projection<T> projection;                // of queries
  const uint32_t* key_operands = nullptr;  // of keys
  const float* out = nullptr;              // [count][rows, H, W]
  const float* lse = nullptr;              // [count][rows, H]
  int64_t count = 0;
  const float *before_log_mass = nullptr, *before_mean = nullptr;
  bool before_each = false;
  int64_t before_count = 0;
};

template <class T, int W>
class Causal : public Forward<T, W> {
 public:
  using Forward<T, W>::Forward;

  // With `parts`, these instead of call.out.
  Status Run(const performer::CausalParams& call, CausalParts<T>* parts = nullptr) const {
    Division splits;
    PERFORMER_RETURN_IF_ERROR(this->Divide(dims_.keys, kSplits, &splits));
    CausalParams<T> p;
    PERFORMER_RETURN_IF_ERROR(StatesBefore(call, splits, &p));
    PERFORMER_RETURN_IF_ERROR(FinalStatesOfEmptySequences(call, splits));
    PERFORMER_RETURN_IF_ERROR(this->template PackProjection<W>(
        call.queries.projection, call.queries.projection_heads, &p.projection));
    PERFORMER_RETURN_IF_ERROR(this->template PackOperands<W>(
        call.keys.projection, call.keys.projection_heads, &p.key_operands));
    p.key_head_step = call.keys.projection_heads == 1 ? 0 : this->features_pad_;
    p.operand_row = W * static_cast<int64_t>(sizeof(T)) / 4;
    p.query = InputRows<T>(call.queries.query, dims_.heads, dims_.key_dim);
    p.keys = MakeKeyParams<T>(this->call_, call.keys);
    p.feature_bias = static_cast<const float*>(call.queries.feature_bias);
    p.feature_bias_heads = call.queries.feature_bias_heads;
    p.map = map_;
    p.splits = splits.tiles;
    p.groups = dims_.groups;
    p.features = dims_.features;
    p.features_pad = this->features_pad_;
    p.out = OutputRows<T>(call.out, dims_.heads, dims_.value_dim);
    p.log_mass = static_cast<float*>(call.state.log_mass);
    p.mean = static_cast<float*>(call.state.mean);
    if (parts != nullptr) {
      parts->splits = splits;
      parts->projection = p.projection;
      parts->key_operands = p.key_operands;
      parts->before_log_mass = p.before_log_mass;
      parts->before_mean = p.before_mean;
      parts->before_each = p.before_each;
      parts->before_count = p.before_count;
    }
    if constexpr (W == 64)
      if (launcher_.HasSmallBlocks()) return Launch<1, true>(splits, p, parts);
    if constexpr (kIs16Bit<T> && W == 64)
      if (dims_.features > CausalLayout<T, W, 1, false>::kFeatures)
        return Launch<2, false>(splits, p, parts);
    return Launch<1, false>(splits, p, parts);
  }

 private:
  using Operands<T>::dims_;
  using Operands<T>::launcher_;
  using Operands<T>::map_;

  Status StatesBefore(const performer::CausalParams& call, const Division& splits,
                      CausalParams<T>* p) const {
    p->before_log_mass = static_cast<const float*>(call.initial.log_mass);
    p->before_mean = static_cast<const float*>(call.initial.mean);
    p->before_count = call.initial.count;
    if (splits.most <= 1) return Status();
    MergeParams merge;
    PERFORMER_RETURN_IF_ERROR(this->SummarizeSplits(call.keys, splits, true, &merge));
    merge.initial_log_mass = p->before_log_mass;
    merge.initial_mean = p->before_mean;
    merge.initial_count = p->before_count;
    PERFORMER_RETURN_IF_ERROR(Merge(launcher_, merge));
    p->before_log_mass = merge.part_log_mass;
    p->before_mean = merge.part_mean;
    p->before_each = true;
    return Status();
  }

  Status FinalStatesOfEmptySequences(const performer::CausalParams& call,
                                     const Division& splits) const {
    if (!splits.some_empty) return Status();
    MergeParams merge;
    merge.splits = splits.tiles;
    merge.groups = dims_.groups;
    merge.features = dims_.features;
    merge.width = static_cast<int>(dims_.value_dim);
    merge.initial_log_mass = static_cast<const float*>(call.initial.log_mass);
    merge.initial_mean = static_cast<const float*>(call.initial.mean);
    merge.initial_count = call.initial.count;
    merge.log_mass = static_cast<float*>(call.state.log_mass);
    merge.mean = static_cast<float*>(call.state.mean);
    merge.only_empty = true;
    return Merge(launcher_, merge);
  }

  template <int kGroups, bool kSmall>
  Status Launch(const Division& splits, CausalParams<T> p, CausalParts<T>* parts) const {
    using Layout = CausalLayout<T, W, kGroups, kSmall>;
    const Grid grid = {splits.count, dims_.heads, CeilDiv(dims_.features, Layout::kFeatures)};
    const int64_t rows = dims_.batch * dims_.queries;
    MergeOutputsParams<T> merge;
    if (grid.z > 1 || parts != nullptr) {
      p.part_lse = rows * dims_.heads;
      p.part_size = p.part_lse * W;
      PERFORMER_RETURN_IF_ERROR(
          launcher_.Allocate(grid.z * p.part_size, "partial outputs", &p.part_out));
      PERFORMER_RETURN_IF_ERROR(launcher_.Allocate(grid.z * p.part_lse, "partial outputs", &p.lse));
    }
    PERFORMER_RETURN_IF_ERROR(launcher_.Launch("causal", CausalKernel<T, W, kGroups, kSmall>, grid,
                                               Layout::kThreads, Layout::kBytes, p));
    if (parts != nullptr) {
      parts->out = p.part_out;
      parts->lse = p.lse;
      parts->count = grid.z;
    }
    if (grid.z == 1 || parts != nullptr) return Status();
    merge.part_out = p.part_out;
    merge.part_lse = p.lse;
    merge.parts = grid.z;
    merge.rows = rows;
    merge.out = p.out;
    constexpr int kThreads = 256;
    return launcher_.Launch("merge outputs", MergeOutputsKernel<T, W>,
                            {CeilDiv(p.part_lse * 32, kThreads)}, kThreads, 0, merge);
  }
};

}  // namespace cuda
}  // namespace performer
