// The kernels of one instruction set. They are single-threaded, and each call handles one work
// item; the drivers divide the work.
#pragma once
#include "cpu/kernels/causal/sub_chunks.h"
#include "cpu/memory/layout.h"
#include "cpu/sharing.h"

namespace performer {
namespace cpu {

// Every kernel returns false if it found no scratch memory; its outputs are then not valid.
// `projection` holds PackedProjection<Acc>::Size values for each head of the projection in params.
template <class Acc>
struct Kernels {
  // to[PackedProjection::Size] = the projection [m, d], rounded once to `dtype` and packed.
  void (*pack_projection)(const Attributes& attributes, DType dtype, const Strides& strides,
                          const Acc* projection, Acc* to);

  // The same for the bidirectional kernels, which may use another form.
  void (*pack_bidirectional)(const Attributes& attributes, DType dtype, const Strides& strides,
                             const Acc* projection, Acc* to);

  // The same for causal, causal_keys, causal_queries and causal_grad.
  void (*pack_causal)(const Attributes& attributes, DType dtype, const Strides& strides,
                      const Acc* projection, Acc* to);

  // Summarizes the keys of the range, of a key/value head, into `partial`.
  bool (*summarize)(const SummarizeParams& params, const Acc* projection, WorkRange range,
                    SummaryPartial<Acc> partial);

  // Merges `more` into `into`; both are partial results of the same head.
  void (*merge)(const Strides& strides, SummaryPartial<Acc> into, SummaryPartial<Acc> more);

  // log_mass[m] and mean[m][e] of a partial result.
  void (*finish)(const Strides& strides, SummaryPartial<Acc> partial, Acc* log_mass, Acc* mean);

  // Rows of params.out for the range, of a query head.
  bool (*read)(const ReadParams& params, const Acc* projection, WorkRange range);

  // A whole sequence and key/value head: writes out of its query heads, and the final state.
  bool (*causal)(const CausalParams& params, const Acc* query_projection, const Acc* key_projection,
                 WorkRange range);

  // The same in parts, on several threads. causal_keys writes the next sub-chunks of the chain to
  // `window`, window->slots of them or all that are left; at the end of the chain it writes the
  // final state. An item of a window is one of its sub-chunks and one query head of key/value head
  // `group`: causal_queries writes out of those items that no other call takes.
  bool (*causal_keys)(const CausalParams& params, const Acc* key_projection,
                      CausalChain<Acc>* chain, CausalWindow<Acc>* window);
  bool (*causal_queries)(const CausalParams& params, const Acc* query_projection, int64_t group,
                         CausalWindow<Acc>* window);

  // Near-and-far attention: a whole sequence and key/value head, as `causal`, with the memory and
  // threads that it may use.
  bool (*near_far)(const NearFarParams& params, const Acc* query_projection,
                   const Acc* key_projection, WorkRange range, const Sharing& sharing);

  // A whole sequence and key/value head for one token, range.end = range.begin + 1. It uses the
  // projections in params.
  bool (*decode)(const CausalParams& params, WorkRange range);

  // Gradients. key_bias [B, G, S] receives that of the log weights of the keys.
  bool (*summarize_grad)(const SummarizeGradParams& params, const Acc* projection, WorkRange range,
                         Acc* key_bias, Acc* partial_projection);

  bool (*read_grad)(const ReadGradParams& params, const Acc* projection, WorkRange range,
                    ReadGradPartial<Acc> partial);

  bool (*causal_grad)(const CausalGradParams& params, const Acc* query_projection,
                      const Acc* key_projection, WorkRange range, Acc* key_bias,
                      CausalGradPartial<Acc> partial);

  bool (*near_far_grad)(const NearFarGradParams& params, const Acc* query_projection,
                        const Acc* key_projection, WorkRange range, const Sharing& sharing,
                        Acc* key_bias, CausalGradPartial<Acc> partial);

  // For tests: y[i] = 2^x[i] and log2(x[i]), n a multiple of kPad.
  void (*exp2)(const Acc* x, int64_t n, Acc* y);
  void (*log2)(const Acc* x, int64_t n, Acc* y);
};

}  // namespace cpu
}  // namespace performer
