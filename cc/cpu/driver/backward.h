// Drivers of the gradients.
#pragma once
#include "cpu/driver/context.h"
#include "cpu/driver/reduce.h"

namespace performer {
namespace cpu {

template <class Acc>
class BackwardDriver : public Driver<Acc> {
 public:
  using Driver<Acc>::Driver;

  Status Run(const SummarizeGradParams& params) {
    Buffer<Acc> projection, key_bias;
    Totals<Acc> total;
    PERFORMER_RETURN_IF_ERROR(
        PackProjections(kernels_.pack_bidirectional, params.keys, &projection));
    PERFORMER_RETURN_IF_ERROR(
        Allocate(dims_.batch * dims_.groups * dims_.keys, "the gradient of key_bias", &key_bias));
    PERFORMER_RETURN_IF_ERROR(
        total.Start(params.keys.projection_heads, strides_.m, strides_.d, strides_.d_pad));
    WorkList list;
    PERFORMER_RETURN_IF_ERROR(DivideKeys(call_, &list));
    const auto run = [&](const WorkRange& range, Acc* partial) {
      return kernels_.summarize_grad(params, projection.get(), range, key_bias.get(), partial);
    };
    const int64_t size = strides_.m * strides_.d_pad;
    PERFORMER_RETURN_IF_ERROR(ForWaves<Acc>(
        list, size, Cost(10), parallel_for_, run, [&](int64_t first, int64_t last, Acc* partials) {
          FoldRows(total, [&](int64_t row) {
            for (int64_t i = first; i < last; ++i)
              total.Add(KeyHeadIndex(params.keys.projection_heads, list.ranges[i].head), row,
                        partials + (i - first) * size);
          });
        }));
    total.Store(RootScale(), params.grad_keys.projection);
    ReduceKeyBias(dims_, params.keys, key_bias.get(), params.grad_keys.bias);
    return Status();
  }

  Status Run(const ReadGradParams& params) {
    Buffer<Acc> projection;
    Totals<Acc> total, bias;
    PERFORMER_RETURN_IF_ERROR(
        PackProjections(kernels_.pack_bidirectional, params.queries, &projection));
    PERFORMER_RETURN_IF_ERROR(
        total.Start(params.queries.projection_heads, strides_.m, strides_.d, strides_.d_pad));
    PERFORMER_RETURN_IF_ERROR(bias.Start(params.queries.feature_bias_heads, strides_.m, 1, 1));
    WorkList list;
    PERFORMER_RETURN_IF_ERROR(DivideQueries(call_, SplitRows, &list));
    std::fill_n(static_cast<Acc*>(params.grad_state.log_mass),
                dims_.sequences * dims_.groups * strides_.m, Acc(0));
    std::fill_n(static_cast<Acc*>(params.grad_state.mean),
                dims_.sequences * dims_.groups * strides_.m * strides_.e, Acc(0));
    const auto run = [&](const WorkRange& range, Acc* partial) {
      return kernels_.read_grad(params, projection.get(), range,
                                ReadGradPartial<Acc>::At(partial, strides_));
    };
    const int64_t size = ReadGradPartial<Acc>::Size(strides_);
    PERFORMER_RETURN_IF_ERROR(ForWaves<Acc>(
        list, size, Cost(10), parallel_for_, run, [&](int64_t first, int64_t last, Acc* partials) {
          FoldRows(total, [&](int64_t row) {
            for (int64_t i = first; i < last; ++i) {
              const WorkRange& range = list.ranges[i];
              const auto partial =
                  ReadGradPartial<Acc>::At(partials + (i - first) * size, strides_);
              total.Add(QueryHeadIndex(params.queries.projection_heads, range.head, dims_), row,
                        partial.projection);
              bias.Add(QueryHeadIndex(params.queries.feature_bias_heads, range.head, dims_), row,
                       partial.log_mass);
              AddState(range.sequence, range.head / GroupSize(dims_), row, partial.log_mass,
                       partial.mean, params.grad_state);
            }
          });
        }));
    total.Store(RootScale(), params.grad_queries.projection);
    bias.Store(1, params.grad_queries.feature_bias);
    return Status();
  }

  Status Run(const CausalGradParams& params) {
    return RunSequences(params, kernels_.pack_causal, Cost(26), [&](int64_t, auto... arguments) {
      return kernels_.causal_grad(params, arguments...);
    });
  }
  Status Run(const NearFarGradParams& params) {
    return RunSequences(params, kernels_.pack_projection, Cost(30),
                        [&](int64_t in_flight, const Acc* query_projection,
                            const Acc* key_projection, const WorkRange& range, auto... results) {
                          return kernels_.near_far_grad(
                              params, query_projection, key_projection, range,
                              Share(in_flight, strides_.d + strides_.e, Cost(30)), results...);
                        });
  }

 private:
  // Runs a kernel for whole sequences of keys and the queries that see them, with the projections
  // that `pack` makes: kernel(in_flight,
  // query_projection, key_projection, range, key_bias, partial), of which in_flight run at a time.
  template <class Params, class Pack, class Kernel>
  Status RunSequences(const Params& params, Pack pack, int64_t cost_per_row, Kernel kernel) {
    Buffer<Acc> query_projection, key_projection, key_bias;
    Totals<Acc> query_total, key_total, bias, log_mass, mean;
    const int64_t states = params.initial.count * dims_.groups;
    PERFORMER_RETURN_IF_ERROR(PackProjections(pack, params.queries, &query_projection));
    PERFORMER_RETURN_IF_ERROR(PackProjections(pack, params.keys, &key_projection));
    PERFORMER_RETURN_IF_ERROR(
        Allocate(dims_.batch * dims_.groups * dims_.keys, "the gradient of key_bias", &key_bias));
    PERFORMER_RETURN_IF_ERROR(
        query_total.Start(params.queries.projection_heads, strides_.m, strides_.d, strides_.d_pad));
    PERFORMER_RETURN_IF_ERROR(
        key_total.Start(params.keys.projection_heads, strides_.m, strides_.d, strides_.d_pad));
    PERFORMER_RETURN_IF_ERROR(bias.Start(params.queries.feature_bias_heads, strides_.m, 1, 1));
    PERFORMER_RETURN_IF_ERROR(log_mass.Start(states, strides_.m, 1, 1));
    PERFORMER_RETURN_IF_ERROR(mean.Start(states, strides_.m, strides_.e, strides_.e_pad));
    WorkList list;
    PERFORMER_RETURN_IF_ERROR(DivideSequences(call_, &list));
    const int64_t group = GroupSize(dims_), size = CausalGradPartial<Acc>::Size(strides_, group);
    const auto run = [&](const WorkRange& range, Acc* partial) {
      return kernel(std::min(threads_.count, list.count), query_projection.get(),
                    key_projection.get(), range, key_bias.get(),
                    CausalGradPartial<Acc>::At(partial, strides_, group));
    };
    PERFORMER_RETURN_IF_ERROR(ForWaves<Acc>(
        list, size, cost_per_row, parallel_for_, run,
        [&](int64_t first, int64_t last, Acc* partials) {
          FoldRows(key_total, [&](int64_t row) {
            for (int64_t i = first; i < last; ++i) {
              const WorkRange& range = list.ranges[i];
              const auto partial =
                  CausalGradPartial<Acc>::At(partials + (i - first) * size, strides_, group);
              const int64_t state =
                  (params.initial.count == 1 ? 0 : range.sequence) * dims_.groups + range.head;
              key_total.Add(KeyHeadIndex(params.keys.projection_heads, range.head), row,
                            partial.key_projection);
              log_mass.Add(state, row, partial.log_mass);
              mean.Add(state, row, partial.mean);
              for (int64_t j = 0; j < group; ++j) {
                const int64_t head = range.head * group + j;
                query_total.Add(QueryHeadIndex(params.queries.projection_heads, head, dims_), row,
                                partial.query_projection + j * strides_.m * strides_.d_pad);
                bias.Add(QueryHeadIndex(params.queries.feature_bias_heads, head, dims_), row,
                         partial.feature_bias + j * strides_.m_pad);
              }
            }
          });
        }));
    query_total.Store(RootScale(), params.grad_queries.projection);
    key_total.Store(RootScale(), params.grad_keys.projection);
    bias.Store(1, params.grad_queries.feature_bias);
    log_mass.Store(1, params.grad_initial.log_mass);
    mean.Store(1, params.grad_initial.mean);
    ReduceKeyBias(dims_, params.keys, key_bias.get(), params.grad_keys.bias);
    return Status();
  }

  using Base = Driver<Acc>;
  using Base::call_, Base::dims_, Base::strides_, Base::kernels_, Base::threads_,
      Base::parallel_for_;
  using Base::Cost, Base::PackProjections, Base::RootScale, Base::Share;

  // fold(row) for every row (feature) of the totals, in parallel.
  template <class Fold>
  void FoldRows(const Totals<Acc>& total, Fold fold) const {
    parallel_for_(total.rows(), 2 * (strides_.d + strides_.e), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) fold(row);
    });
  }

  // Adds one feature of a partial gradient of the state.
  void AddState(int64_t sequence, int64_t group, int64_t m, const Acc* log_mass, const Acc* mean,
                const MutableState& to) const {
    const int64_t at = (sequence * dims_.groups + group) * strides_.m + m;
    static_cast<Acc*>(to.log_mass)[at] += log_mass[m];
    for (int64_t e = 0; e < strides_.e; ++e)
      static_cast<Acc*>(to.mean)[at * strides_.e + e] += mean[m * strides_.e_pad + e];
  }
};

}  // namespace cpu
}  // namespace performer
