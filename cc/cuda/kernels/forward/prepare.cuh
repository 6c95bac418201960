// What launchers prepare in workspace before a kernel that walks rows: projections and means as
// operands (forward/pack.cuh), and the parameters that point to them.
#pragma once
#include "cuda/host/context.h"
#include "cuda/kernels/forward/pack.cuh"

namespace performer {
namespace cuda {

// float32 matrices [matrices, M, width] as operands T [matrices, M_pad, W]. log_mass [matrices, M]
// or nullptr: rows where it is -inf become zeros. origin [matrices, W] or nullptr: the others become
// less by it.
template <class T, int W>
Status Pack(const Context& context, const char* purpose, const void* from, const float* log_mass,
            int64_t matrices, int64_t width, const T** to, const float* origin = nullptr) {
  T* packed = nullptr;
  const int64_t rows = matrices * context.features_pad;
  PERFORMER_RETURN_IF_ERROR(context.launcher.Allocate(rows * W, purpose, &packed));
  *to = packed;
  const PackParams params = {static_cast<const float*>(from),
                             log_mass,
                             origin,
                             packed,
                             matrices,
                             context.dims.features,
                             context.features_pad,
                             static_cast<int>(width)};
  return context.launcher.Launch(purpose, PackKernel<T, W>,
                                 {CeilDiv(rows * 32, kElementwiseThreads)}, kElementwiseThreads, 0,
                                 params);
}

// Projections [heads, M, D] as operands [heads, M_pad, W].
template <class T, int W>
Status PackProjection(const Context& context, const void* from, int64_t heads, Projection<T>* to) {
  to->heads = heads;
  return Pack<T, W>(context, "the packed projection", from, nullptr, heads, context.dims.key_dim,
                    &to->data);
}

// Projections [heads, M, D] as A operands in the order of the registers (PackOperandsKernel).
template <class T, int W>
Status PackOperands(const Context& context, const void* from, int64_t heads, const uint32_t** to) {
  uint32_t* packed = nullptr;
  const int64_t registers = heads * context.features_pad * W * static_cast<int64_t>(sizeof(T)) / 4;
  PERFORMER_RETURN_IF_ERROR(context.launcher.Allocate(registers, "the packed projection", &packed));
  *to = packed;
  const PackParams params = {static_cast<const float*>(from),
                             nullptr,
                             nullptr,
                             packed,
                             heads,
                             context.dims.features,
                             context.features_pad,
                             static_cast<int>(context.dims.key_dim)};
  return context.launcher.Launch("packing a projection", PackOperandsKernel<T, W>,
                                 {CeilDiv(registers, kElementwiseThreads)}, kElementwiseThreads, 0,
                                 params);
}

// origin [state_count G, W] or nullptr: what the means become less by.
template <class T, int W>
Status FillStateRead(const Context& context, const QuerySide& queries, const State& state,
                     const Division& tiles, StateReadParams<T>* params,
                     const float* origin = nullptr) {
  context.FillQueries(queries, tiles, params);
  params->log_mass = static_cast<const float*>(state.log_mass);
  params->state_count = state.count;
  PERFORMER_RETURN_IF_ERROR((PackProjection<T, W>(context, queries.projection,
                                                  queries.projection_heads, &params->projection)));
  return Pack<T, W>(context, "the packed mean", state.mean, params->log_mass,
                    state.count * context.dims.groups, context.dims.value_dim, &params->mean,
                    origin);
}

template <class T, int W>
Status FillKeyRead(const Context& context, const KeySide& keys, const Division& splits,
                   KeyReadParams<T>* params) {
  context.Fill(splits, params);
  context.FillKeys(keys, &params->keys);
  return PackProjection<T, W>(context, keys.projection, keys.projection_heads, &params->projection);
}

}  // namespace cuda
}  // namespace performer
