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
    return dims_.keys == 1 && !call_.offsets ? Decode(params) : RunSequences(params);
  }

  Status Run(const NearFarParams& params) {
    Buffer<Acc> query_projection, key_projection;
    // Packing does not pay for a token.
    if (dims_.queries != 1 || !params.attributes.causal || call_.offsets) {
      PERFORMER_RETURN_IF_ERROR(
          PackProjections(kernels_.pack_projection, params.queries, &query_projection));
      PERFORMER_RETURN_IF_ERROR(
          PackProjections(kernels_.pack_projection, params.keys, &key_projection));
    }
    WorkList list;
    PERFORMER_RETURN_IF_ERROR(DivideSequences(call_, &list));
    return ForEachItem(
        list, 0, list.count, Cost(10), parallel_for_, [&](const WorkRange& range, int64_t) {
          return kernels_.near_far(params, query_projection.get(), key_projection.get(), range);
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

  Status RunSequences(const CausalParams& params) {
    Buffer<Acc> query_projection, key_projection;
    PERFORMER_RETURN_IF_ERROR(
        PackProjections(kernels_.pack_projection, params.queries, &query_projection));
    PERFORMER_RETURN_IF_ERROR(
        PackProjections(kernels_.pack_projection, params.keys, &key_projection));
    WorkList list;
    PERFORMER_RETURN_IF_ERROR(DivideSequences(call_, &list));
    if (CausalPipeline<Acc>::IsWorthSplitting(list, strides_, threads_))
      return CausalPipeline<Acc>(params, kernels_, query_projection.get(), key_projection.get())
          .Run(list, threads_, Cost(8));
    return ForEachItem(
        list, 0, list.count, Cost(8), parallel_for_, [&](const WorkRange& range, int64_t) {
          return kernels_.causal(params, query_projection.get(), key_projection.get(), range);
        });
  }

  using Base = Driver<Acc>;
  using Base::call_, Base::dims_, Base::strides_, Base::kernels_, Base::threads_,
      Base::parallel_for_;
  using Base::Cost, Base::PackProjections;

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
