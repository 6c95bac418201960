// One chunk of keys and values in scratch memory, with the mask and the offsets of the keys.
#pragma once
#include <type_traits>

#include "cpu/kernels/log_features.h"

PERFORMER_ISA_BEGIN

template <class Acc>
struct KeyChunk {
  Acc* k;         // [chunk][d_pad]
  Acc* v;         // [chunk][e_pad]
  Acc* offset;    // [chunk]: what is added to the log-features; -inf where masked
  uint8_t* skip;  // [chunk]: 1 where masked
  bool any, all;  // whether any, or all, keys of the chunk are not masked

  void SetPointers(Arena& arena, const Strides& strides, int64_t chunk) {
    k = arena.Take<Acc>(chunk * strides.d_pad);
    v = arena.Take<Acc>(chunk * strides.e_pad);
    offset = arena.Take<Acc>(chunk);
    skip = arena.Take<uint8_t>(chunk);
  }

  // Loads rows [row, row + n) of the head. Masked rows become 0, whatever they hold.
  void Load(const Common& call, const KeySide& keys, const Map<Acc>& map, const Strides& strides,
            const WorkRange& range, int64_t row, int64_t n, Prefetcher* prefetcher) {
    LoadBias(call, keys, range, row, n);
    LoadRows<Acc>(Keys(call, keys, range), row, n, skip, k, strides.d_pad, prefetcher);
    LoadRows<Acc>(Values(call, keys, range), row, n, skip, v, strides.e_pad, prefetcher);
    FinishOffsets(
        map, n, [&](int64_t j) { return SquaredNorm<Acc>(k + j * strides.d_pad, strides.d_pad); });
  }

  static ConstRows Keys(const Common& call, const KeySide& keys, const WorkRange& range) {
    return {keys.key, call.dtype, call.dims.groups, range.head, call.dims.key_dim};
  }
  static ConstRows Values(const Common& call, const KeySide& keys, const WorkRange& range) {
    return {keys.value, call.dtype, call.dims.groups, range.head, call.dims.value_dim};
  }
  // Loads the key biases into offset, and sets what they mask.
  void LoadBias(const Common& call, const KeySide& keys, const WorkRange& range, int64_t row,
                int64_t n) {
    const int64_t batch = call.offsets ? 0 : range.sequence;
    const Acc* bias =
        static_cast<const Acc*>(keys.bias) + ((keys.bias_batch == 1 ? 0 : batch) * keys.bias_heads +
                                              KeyHeadIndex(keys.bias_heads, range.head)) *
                                                 keys.bias_length;
    const int64_t first = row - batch * call.dims.keys, stride = keys.bias_length == 1 ? 0 : 1;
    any = false, all = true;
    for (int64_t j = 0; j < n; ++j) {
      offset[j] = bias[(first + j) * stride];
      skip[j] = offset[j] == -kInf<Acc>;
      any |= !skip[j];
      all &= !skip[j];
    }
  }
  // Turns biases into offsets: subtracts the norms and converts to base 2.
  template <class Norm>
  PERFORMER_INLINE void FinishOffsets(const Map<Acc>& map, int64_t n, Norm squared_norm) {
    const Acc half = map.key_norm ? map.scale / 2 : Acc(0);
    for (int64_t j = 0; j < n; ++j)
      offset[j] = kLog2e<Acc> * (offset[j] - (map.key_norm ? half * squared_norm(j) : Acc(0)));
  }
};

// Keys as left operand, without a copy if that is possible and none is masked; finishes their
// offsets.
template <class Acc, class In>
PERFORMER_INLINE Left<In> LoadKeys(const ConstRows& rows, int64_t row, int64_t n,
                                   const Map<Acc>& map, int64_t width, KeyChunk<Acc>* keys,
                                   In* operand, Prefetcher* prefetcher) {
  using T = std::conditional_t<std::is_same_v<In, Acc>, Acc, BFloat16>;
  if (keys->all && Operands<Acc, In>::IsLeftInPlace(rows, width)) {
    prefetcher->RequestNext(rows, row, n);
    keys->FinishOffsets(
        map, n, [&](int64_t j) { return SquaredNorm<Acc>(rows.template At<T>(row + j), width); });
    return Operands<Acc, In>::LeftInPlace(rows, row);
  }
  LoadRows(rows, row, n, keys->skip, keys->k, width, prefetcher);
  keys->FinishOffsets(map, n,
                      [&](int64_t j) { return SquaredNorm<Acc>(keys->k + j * width, width); });
  return Operands<Acc, In>::MakeLeft(keys->k, n, width, width, operand);
}

PERFORMER_ISA_END
