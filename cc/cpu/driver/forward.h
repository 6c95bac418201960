// Drivers of the forward operators.
#pragma once
#include "cpu/driver/context.h"
#include "cpu/driver/pipeline.h"

namespace performer {
namespace cpu {

template <class Acc>
class ForwardDriver : public Driver<Acc> {
 public:
  using Driver<Acc>::Driver;

  Status Run(const SummarizeParams& params) {
    Buffer<Acc> projection;
    PERFORMER_RETURN_IF_ERROR(
        PackProjections(kernels_.pack_bidirectional, params.keys, &projection));
    WorkList list;
    PERFORMER_RETURN_IF_ERROR(DivideKeys(call_, &list));
    const auto run = [&](const WorkRange& range, Acc* partial) {
      return kernels_.summarize(params, projection.get(), range,
                                SummaryPartial<Acc>::At(partial, strides_));
    };
    const int64_t size = SummaryPartial<Acc>::Size(strides_);
    return ForWaves<Acc>(
        list, size, Cost(4), parallel_for_, run, [&](int64_t first, int64_t last, Acc* partials) {
          ForPairs(list, first, last, [&](int64_t begin, int64_t end) {
            const auto at = [&](int64_t i) {
              return SummaryPartial<Acc>::At(partials + (i - first) * size, strides_);
            };
            for (int64_t i = begin + 1; i < end; ++i) kernels_.merge(strides_, at(begin), at(i));
            const WorkRange& range = list.ranges[begin];
            const int64_t row = (range.sequence * dims_.groups + range.head) * strides_.m;
            kernels_.finish(strides_, at(begin), static_cast<Acc*>(params.state.log_mass) + row,
                            static_cast<Acc*>(params.state.mean) + row * strides_.e);
          });
        });
  }

  Status Run(const ReadParams& params) {
    Buffer<Acc> projection;
    PERFORMER_RETURN_IF_ERROR(
        PackProjections(kernels_.pack_bidirectional, params.queries, &projection));
    WorkList list;
    PERFORMER_RETURN_IF_ERROR(DivideQueries(call_, [](int64_t) { return kSplitUnit; }, &list));
    return ForEachItem(list, 0, list.count, Cost(4), parallel_for_,
                       [&](const WorkRange& range, int64_t) {
                         return kernels_.read(params, projection.get(), range);
                       });
  }

  Status Run(const CausalParams& params) {
    if (dims_.keys == 1 && !call_.offsets) return Decode(params);
    return RunSequences(params, kernels_.pack_causal,
                        [&](const WorkList& list, const Acc* queries, const Acc* keys) {
                          if (CausalPipeline<Acc>::IsWorthSplitting(list, strides_, threads_))
                            return CausalPipeline<Acc>(params, kernels_, queries, keys)
                                .Run(list, threads_, Cost(8));
                          return ForEachItem(list, 0, list.count, Cost(8), parallel_for_,
                                             [&](const WorkRange& range, int64_t) {
                                               return kernels_.causal(params, queries, keys, range);
                                             });
                        });
  }

  Status Run(const NearFarParams& params) {
    // Packing does not pay for a token.
    const bool token = dims_.queries == 1 && params.attributes.causal && !call_.offsets;
    return RunSequences(
        params, token ? nullptr : kernels_.pack_projection,
        [&](const WorkList& list, const Acc* queries, const Acc* keys) {
          const auto run = [&](const Sharing& sharing) {
            return [&, sharing](const WorkRange& range, int64_t) {
              return kernels_.near_far(params, queries, keys, range, sharing);
            };
          };
          if (token || list.count >= threads_.count || !IsLong(list))
            return ForEachItem(
                list, 0, list.count, Cost(10), parallel_for_,
                run(Share(std::min(threads_.count, list.count), strides_.e, Cost(10))));
          // Fewer sequences and heads than threads: all threads share one at a time.
          Sharing sharing = Share(1, strides_.e, Cost(10));
          sharing.threads = threads_.count;
          sharing.owner = &parallel_for_;
          sharing.parallel_for = [](const void* owner, int64_t count, int64_t cost,
                                    void (*body)(void* context, int64_t begin, int64_t end),
                                    void* context) {
            (*static_cast<const ParallelFor*>(owner))(
                count, cost, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          };
          const auto one_thread = [](int64_t count, int64_t,
                                     const std::function<void(int64_t, int64_t)>& body) {
            body(0, count);
          };
          return ForEachItem(list, 0, list.count, Cost(10), one_thread, run(sharing));
        });
  }

 private:
  Status Decode(const CausalParams& params) {
    WorkList list;
    PERFORMER_RETURN_IF_ERROR(DivideSequences(call_, &list));
    return ForEachItem(
        list, 0, list.count, Cost(8), parallel_for_,
        [&](const WorkRange& range, int64_t) { return kernels_.decode(params, range); });
  }

  // run(list, query_projection, key_projection) for the whole sequences of the call, and the packed
  // projections that `pack`, one of the kernels or nullptr, makes.
  template <class Params, class Pack, class Run>
  Status RunSequences(const Params& params, Pack pack, Run run) {
    Buffer<Acc> query_projection, key_projection;
    if (pack) {
      PERFORMER_RETURN_IF_ERROR(PackProjections(pack, params.queries, &query_projection));
      PERFORMER_RETURN_IF_ERROR(PackProjections(pack, params.keys, &key_projection));
    }
    WorkList list;
    PERFORMER_RETURN_IF_ERROR(DivideSequences(call_, &list));
    return run(list, query_projection.get(), key_projection.get());
  }

  // Whether some sequence has blocks for every thread.
  bool IsLong(const WorkList& list) const {
    int64_t rows = 0;
    for (int64_t i = 0; i < list.count; ++i)
      rows = std::max(rows, list.ranges[i].end - list.ranges[i].begin);
    return rows / call_.attributes.exact_window >= 2 * threads_.count;
  }

  using Base = Driver<Acc>;
  using Base::call_, Base::dims_, Base::strides_, Base::kernels_, Base::threads_,
      Base::parallel_for_;
  using Base::Cost, Base::PackProjections, Base::Share;

  // body(begin, end) for the items of every sequence and head among [first, last), in parallel.
  template <class Body>
  void ForPairs(const WorkList& list, int64_t first, int64_t last, Body body) const {
    const int64_t* const ends = list.ends.get();
    const int64_t begin = std::upper_bound(ends, ends + list.pairs, first) - ends;
    const int64_t end = std::lower_bound(ends, ends + list.pairs, last) - ends + 1;
    parallel_for_(end - begin, 2 * strides_.m * strides_.e + 1, [&](int64_t from, int64_t to) {
      for (int64_t pair = begin + from; pair < begin + to; ++pair)
        body(pair == 0 ? 0 : ends[pair - 1], ends[pair]);
    });
  }
};

}  // namespace cpu
}  // namespace performer
