#include "cpu/run.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/dispatch.h"
#include "cpu/reduce.h"
#include "cpu/work.h"

namespace performer {
namespace cpu {
namespace {

template <class Acc>
constexpr Acc kNothing = -std::numeric_limits<Acc>::infinity();

const char kNoScratch[] = "out of memory for scratch rows";

// Everything the operators share: widths, kernels, threads, packed projections.
template <class Acc>
class Driver {
 public:
  Driver(const Common& call, const Kernels<Acc>& kernels, const ParallelFor& parallel_for)
      : call_(call),
        dims_(call.dims),
        w_(MakeWidths<Acc>(call.dims)),
        kernels_(kernels),
        parallel_for_(parallel_for) {}

  Status Summarize(const SummarizeParams& params) {
    Buffer<Acc> projection;
    PERFORMER_RETURN_IF_ERROR(
        Pack(params.keys.projection, params.keys.projection_heads, &projection));
    const WorkList list = KeySegments();
    const auto run = [&](const Slice& slice, Acc* partial) {
      return kernels_.summarize(params, projection.get(), slice,
                                SummaryPartial<Acc>::At(partial, w_));
    };
    const int64_t size = SummaryPartial<Acc>::Size(w_);
    return ForWaves<Acc>(list, size, Cost(4), parallel_for_, run,
                         [&](int64_t first, int64_t last, Acc* partials) {
                           ForPairs(list, first, last, [&](int64_t begin, int64_t end) {
                             for (int64_t i = begin + 1; i < end; ++i)
                               Merge(SummaryPartial<Acc>::At(partials + (begin - first) * size, w_),
                                     SummaryPartial<Acc>::At(partials + (i - first) * size, w_));
                             Finish(SummaryPartial<Acc>::At(partials + (begin - first) * size, w_),
                                    list.slices[begin], params.state);
                           });
                         });
  }

  Status Read(const ReadParams& params) {
    Buffer<Acc> projection;
    PERFORMER_RETURN_IF_ERROR(
        Pack(params.queries.projection, params.queries.projection_heads, &projection));
    const WorkList list =
        Divide(call_, dims_.heads, dims_.queries, false, [](int64_t) { return kSegmentUnit; });
    const bool ok =
        ForEachItem(list, 0, Count(list), Cost(4), parallel_for_, [&](const Slice& slice, int64_t) {
          return kernels_.read(params, projection.get(), slice);
        });
    return ok ? Status() : Status::ResourceExhausted(kNoScratch);
  }

  Status Causal(const CausalParams& params) {
    Buffer<Acc> query_projection, key_projection;
    PERFORMER_RETURN_IF_ERROR(
        Pack(params.queries.projection, params.queries.projection_heads, &query_projection));
    PERFORMER_RETURN_IF_ERROR(
        Pack(params.keys.projection, params.keys.projection_heads, &key_projection));
    const WorkList list = WholeSequences();
    const bool ok =
        ForEachItem(list, 0, Count(list), Cost(8), parallel_for_, [&](const Slice& slice, int64_t) {
          return kernels_.causal(params, query_projection.get(), key_projection.get(), slice);
        });
    return ok ? Status() : Status::ResourceExhausted(kNoScratch);
  }

  Status SummarizeGrad(const SummarizeGradParams& params) {
    Buffer<Acc> projection, key_bias;
    Totals<Acc> total;
    PERFORMER_RETURN_IF_ERROR(
        Pack(params.keys.projection, params.keys.projection_heads, &projection));
    PERFORMER_RETURN_IF_ERROR(
        Allocate(dims_.batch * dims_.groups * dims_.keys, "the gradient of key_bias", &key_bias));
    PERFORMER_RETURN_IF_ERROR(total.Start(params.keys.projection_heads, w_.m, w_.d, w_.d_pad));
    const WorkList list = KeySegments();
    const auto run = [&](const Slice& slice, Acc* partial) {
      return kernels_.summarize_grad(params, projection.get(), slice, key_bias.get(), partial);
    };
    const int64_t size = w_.m * w_.d_pad;
    PERFORMER_RETURN_IF_ERROR(ForWaves<Acc>(
        list, size, Cost(10), parallel_for_, run, [&](int64_t first, int64_t last, Acc* partials) {
          FoldRows(total, [&](int64_t row) {
            for (int64_t i = first; i < last; ++i)
              total.Add(params.keys.projection_heads == 1 ? 0 : list.slices[i].head, row,
                        partials + (i - first) * size);
          });
        }));
    total.Store(RootScale(), params.grad_keys.projection);
    ReduceKeyBias(dims_, params.keys, key_bias.get(), params.grad_keys.bias);
    return Status();
  }

  Status ReadGrad(const ReadGradParams& params) {
    Buffer<Acc> projection;
    Totals<Acc> total, bias;
    PERFORMER_RETURN_IF_ERROR(
        Pack(params.queries.projection, params.queries.projection_heads, &projection));
    PERFORMER_RETURN_IF_ERROR(total.Start(params.queries.projection_heads, w_.m, w_.d, w_.d_pad));
    PERFORMER_RETURN_IF_ERROR(bias.Start(params.queries.feature_bias_heads, w_.m, 1, 1));
    const WorkList list = Divide(call_, dims_.heads, dims_.queries, false, SegmentRows);
    std::fill_n(static_cast<Acc*>(params.grad_state.log_mass),
                dims_.sequences * dims_.groups * w_.m, Acc(0));
    std::fill_n(static_cast<Acc*>(params.grad_state.mean),
                dims_.sequences * dims_.groups * w_.m * w_.e, Acc(0));
    const auto run = [&](const Slice& slice, Acc* partial) {
      return kernels_.read_grad(params, projection.get(), slice,
                                ReadGradPartial<Acc>::At(partial, w_));
    };
    const int64_t size = ReadGradPartial<Acc>::Size(w_);
    PERFORMER_RETURN_IF_ERROR(ForWaves<Acc>(
        list, size, Cost(10), parallel_for_, run, [&](int64_t first, int64_t last, Acc* partials) {
          FoldRows(total, [&](int64_t row) {
            for (int64_t i = first; i < last; ++i) {
              const Slice& slice = list.slices[i];
              const auto partial = ReadGradPartial<Acc>::At(partials + (i - first) * size, w_);
              total.Add(QueryHeadIndex(params.queries.projection_heads, slice.head, dims_), row,
                        partial.projection);
              bias.Add(QueryHeadIndex(params.queries.feature_bias_heads, slice.head, dims_), row,
                       partial.log_mass);
              AddState(slice.sequence, slice.head / GroupSize(dims_), row, partial.log_mass,
                       partial.mean, params.grad_state);
            }
          });
        }));
    total.Store(RootScale(), params.grad_queries.projection);
    bias.Store(1, params.grad_queries.feature_bias);
    return Status();
  }

  Status CausalGrad(const CausalGradParams& params) {
    Buffer<Acc> query_projection, key_projection, key_bias;
    Totals<Acc> query_total, key_total, bias, log_mass, mean;
    const int64_t states = params.initial.count * dims_.groups;
    PERFORMER_RETURN_IF_ERROR(
        Pack(params.queries.projection, params.queries.projection_heads, &query_projection));
    PERFORMER_RETURN_IF_ERROR(
        Pack(params.keys.projection, params.keys.projection_heads, &key_projection));
    PERFORMER_RETURN_IF_ERROR(
        Allocate(dims_.batch * dims_.groups * dims_.keys, "the gradient of key_bias", &key_bias));
    PERFORMER_RETURN_IF_ERROR(
        query_total.Start(params.queries.projection_heads, w_.m, w_.d, w_.d_pad));
    PERFORMER_RETURN_IF_ERROR(key_total.Start(params.keys.projection_heads, w_.m, w_.d, w_.d_pad));
    PERFORMER_RETURN_IF_ERROR(bias.Start(params.queries.feature_bias_heads, w_.m, 1, 1));
    PERFORMER_RETURN_IF_ERROR(log_mass.Start(states, w_.m, 1, 1));
    PERFORMER_RETURN_IF_ERROR(mean.Start(states, w_.m, w_.e, w_.e_pad));
    const WorkList list = WholeSequences();
    const int64_t group = GroupSize(dims_), size = CausalGradPartial<Acc>::Size(w_, group);
    const auto run = [&](const Slice& slice, Acc* partial) {
      return kernels_.causal_grad(params, query_projection.get(), key_projection.get(), slice,
                                  key_bias.get(), CausalGradPartial<Acc>::At(partial, w_, group));
    };
    PERFORMER_RETURN_IF_ERROR(ForWaves<Acc>(
        list, size, Cost(26), parallel_for_, run, [&](int64_t first, int64_t last, Acc* partials) {
          FoldRows(key_total, [&](int64_t row) {
            for (int64_t i = first; i < last; ++i) {
              const Slice& slice = list.slices[i];
              const auto partial =
                  CausalGradPartial<Acc>::At(partials + (i - first) * size, w_, group);
              const int64_t state =
                  (params.initial.count == 1 ? 0 : slice.sequence) * dims_.groups + slice.head;
              key_total.Add(params.keys.projection_heads == 1 ? 0 : slice.head, row,
                            partial.key_projection);
              log_mass.Add(state, row, partial.log_mass);
              mean.Add(state, row, partial.mean);
              for (int64_t j = 0; j < group; ++j) {
                const int64_t head = slice.head * group + j;
                query_total.Add(QueryHeadIndex(params.queries.projection_heads, head, dims_), row,
                                partial.query_projection + j * w_.m * w_.d_pad);
                bias.Add(QueryHeadIndex(params.queries.feature_bias_heads, head, dims_), row,
                         partial.feature_bias + j * w_.m_pad);
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

 private:
  static int64_t Count(const WorkList& list) { return static_cast<int64_t>(list.slices.size()); }
  double RootScale() const { return std::sqrt(call_.attributes.ResolvedScale(w_.d)); }

  // Nanoseconds for one row that needs `factor` M D multiply-adds or additions, at 20 per
  // nanosecond.
  int64_t Cost(int64_t factor) const { return factor * w_.m * std::max(w_.d, w_.e) / 20 + 1; }

  WorkList KeySegments() const {
    return Divide(call_, dims_.groups, dims_.keys, true, SegmentRows);
  }
  WorkList WholeSequences() const {
    return Divide(call_, dims_.groups, dims_.keys, true,
                  [](int64_t rows) { return std::max<int64_t>(rows, 1); });
  }

  Status Pack(const void* projection, int64_t heads, Buffer<Acc>* packed) const {
    const int64_t size = PackedProjection<Acc>::Size(w_), given = w_.m * w_.d;
    PERFORMER_RETURN_IF_ERROR(Allocate(heads * size, "the packed projection", packed));
    parallel_for_(heads, given, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h)
        kernels_.pack_projection(call_.attributes, call_.dtype, w_,
                                 static_cast<const Acc*>(projection) + h * given,
                                 packed->get() + h * size);
    });
    return Status();
  }

  // body(begin, end) for the items of every sequence and head among [first, last), in parallel.
  template <class Body>
  void ForPairs(const WorkList& list, int64_t first, int64_t last, Body body) const {
    const auto begin =
        std::upper_bound(list.ends.begin(), list.ends.end(), first) - list.ends.begin();
    const auto end =
        std::lower_bound(list.ends.begin(), list.ends.end(), last) - list.ends.begin() + 1;
    parallel_for_(end - begin, 2 * w_.m * w_.e + 1, [&](int64_t from, int64_t to) {
      for (int64_t pair = begin + from; pair < begin + to; ++pair)
        body(pair == 0 ? 0 : list.ends[pair - 1], list.ends[pair]);
    });
  }

  // fold(row) for every row (landmark) of the totals, in parallel.
  template <class Fold>
  void FoldRows(const Totals<Acc>& total, Fold fold) const {
    parallel_for_(total.rows(), 2 * (w_.d + w_.e), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) fold(row);
    });
  }

  // into = into merged with `more`, relative to the larger anchor.
  void Merge(SummaryPartial<Acc> into, SummaryPartial<Acc> more) const {
    for (int64_t m = 0; m < w_.m; ++m) {
      const Acc top = std::max(into.anchor[m], more.anchor[m]);
      if (top == kNothing<Acc>) continue;
      const Acc keep = std::exp2(into.anchor[m] - top), add = std::exp2(more.anchor[m] - top);
      into.mass[m] = keep * into.mass[m] + add * more.mass[m];
      for (int64_t e = m * w_.e_pad; e < (m + 1) * w_.e_pad; ++e)
        into.sum[e] = keep * into.sum[e] + add * more.sum[e];
      into.anchor[m] = top;
    }
  }

  void Finish(SummaryPartial<Acc> partial, const Slice& slice, const MutableState& state) const {
    const int64_t at = (slice.sequence * dims_.groups + slice.head) * w_.m;
    Acc* log_mass = static_cast<Acc*>(state.log_mass) + at;
    Acc* mean = static_cast<Acc*>(state.mean) + at * w_.e;
    for (int64_t m = 0; m < w_.m; ++m) {
      const bool nothing = partial.mass[m] == 0;
      const double log2_mass =
          static_cast<double>(partial.anchor[m]) + std::log2(static_cast<double>(partial.mass[m]));
      log_mass[m] = nothing ? kNothing<Acc> : static_cast<Acc>(log2_mass * std::log(2.0));
      const Acc inverse = nothing ? Acc(0) : 1 / partial.mass[m];
      for (int64_t e = 0; e < w_.e; ++e)
        mean[m * w_.e + e] = nothing ? Acc(0) : partial.sum[m * w_.e_pad + e] * inverse;
    }
  }

  // Adds one landmark of a partial gradient of the state.
  void AddState(int64_t sequence, int64_t group, int64_t m, const Acc* log_mass, const Acc* mean,
                const MutableState& to) const {
    const int64_t at = (sequence * dims_.groups + group) * w_.m + m;
    static_cast<Acc*>(to.log_mass)[at] += log_mass[m];
    for (int64_t e = 0; e < w_.e; ++e)
      static_cast<Acc*>(to.mean)[at * w_.e + e] += mean[m * w_.e_pad + e];
  }

  const Common& call_;
  const Dims& dims_;
  const Widths w_;
  const Kernels<Acc>& kernels_;
  const ParallelFor& parallel_for_;
};

template <class Acc>
Status RunTyped(Op op, const Call& call, const ParallelFor& parallel_for, const std::string& isa) {
  const Kernels<Acc>* kernels = nullptr;
  PERFORMER_RETURN_IF_ERROR(FindKernels(isa, &kernels));
  const auto run = [&](const auto& params, auto method) {
    Driver<Acc> driver(params, *kernels, parallel_for);
    return (driver.*method)(params);
  };
  switch (op) {
    case Op::kSummarize:
      return run(MakeSummarizeParams(call), &Driver<Acc>::Summarize);
    case Op::kRead:
      return run(MakeReadParams(call), &Driver<Acc>::Read);
    case Op::kCausal:
      return run(MakeCausalParams(call), &Driver<Acc>::Causal);
    case Op::kSummarizeGrad:
      return run(MakeSummarizeGradParams(call), &Driver<Acc>::SummarizeGrad);
    case Op::kReadGrad:
      return run(MakeReadGradParams(call), &Driver<Acc>::ReadGrad);
    case Op::kCausalGrad:
      return run(MakeCausalGradParams(call), &Driver<Acc>::CausalGrad);
  }
  return Status::InvalidArgument("unknown operator");
}

}  // namespace

Status Run(Op op, const Call& call, const ParallelFor& parallel_for, const std::string& isa) {
  return call.dtype == DType::kFloat64 ? RunTyped<double>(op, call, parallel_for, isa)
                                       : RunTyped<float>(op, call, parallel_for, isa);
}

}  // namespace cpu
}  // namespace performer
