// What one compiled instruction set offers: single-threaded kernels, each for one work item. The
// drivers (run.h) divide the work.
#pragma once
#include "cpu/kernels/sub_chunks.h"
#include "cpu/memory/layout.h"

namespace performer {
namespace cpu {

// Every kernel returns false if scratch memory could not be allocated, and has then written nothing
// that counts. `projection` is indexed as the heads of params' projection:
// PackedProjection<Acc>::Size elements each.
template <class Acc>
struct Kernels {
  // to[PackedProjection::Size] = w [m, d] rounded once to `dtype`, packed.
  void (*pack_projection)(const Attributes& attributes, DType dtype, const Strides& strides,
                          const Acc* projection, Acc* to);

  // The same for the bidirectional kernels, which may want it in another form.
  void (*pack_bidirectional)(const Attributes& attributes, DType dtype, const Strides& strides,
                             const Acc* projection, Acc* to);

  // Keys of the range (head: a key/value head) into `partial`.
  bool (*summarize)(const SummarizeParams& params, const Acc* projection, WorkRange range,
                    SummaryPartial<Acc> partial);

  // into = into merged with `more`: partial results of the same head.
  void (*merge)(const Strides& strides, SummaryPartial<Acc> into, SummaryPartial<Acc> more);

  // log_mass[m] and mean[m][e] of a partial result.
  void (*finish)(const Strides& strides, SummaryPartial<Acc> partial, Acc* log_mass, Acc* mean);

  // Rows of params.out for the range.
  bool (*read)(const ReadParams& params, const Acc* projection, WorkRange range);

  // A whole sequence and key/value head: out of its query heads, and the final state.
  bool (*causal)(const CausalParams& params, const Acc* query_projection, const Acc* key_projection,
                 WorkRange range);

  // The same in parts, on several threads. causal_keys: the next sub-chunks of the chain into `window`,
  // window->slots of them or all that are left, and then the final state. causal_queries: out of
  // the items of `window` (a sub-chunk and one of the query heads of key/value head `group`) that no
  // other call takes meanwhile.
  bool (*causal_keys)(const CausalParams& params, const Acc* key_projection,
                      CausalChain<Acc>* chain, CausalWindow<Acc>* window);
  bool (*causal_queries)(const CausalParams& params, const Acc* query_projection, int64_t group,
                         CausalWindow<Acc>* window);

  // A whole sequence and key/value head for one token, range.end = range.begin + 1; the projections
  // are those of params.
  bool (*decode)(const CausalParams& params, WorkRange range);

  // key_bias: gradient of the log weights of the keys, [B, G, S].
  bool (*summarize_grad)(const SummarizeGradParams& params, const Acc* projection, WorkRange range,
                         Acc* key_bias, Acc* partial_projection);

  bool (*read_grad)(const ReadGradParams& params, const Acc* projection, WorkRange range,
                    ReadGradPartial<Acc> partial);

  bool (*causal_grad)(const CausalGradParams& params, const Acc* query_projection,
                      const Acc* key_projection, WorkRange range, Acc* key_bias,
                      CausalGradPartial<Acc> partial);

  // For tests: y[i] = 2^x[i] and log2(x[i]), n a multiple of kPad.
  void (*exp2)(const Acc* x, int64_t n, Acc* y);
  void (*log2)(const Acc* x, int64_t n, Acc* y);
};

}  // namespace cpu
}  // namespace performer
