// Rows of tensors on their way into tiles: plain rows, and the stream of keys and values with its
// masks.
#pragma once
#include "cuda/call.cuh"

namespace performer {
namespace cuda {

inline constexpr int kTile = 64;  // tokens of a tile

// Starts copying kRows rows of `width` <= W numbers into a tile, the rest of each row zero. Rows of
// which valid(row) is false are not read: they arrive as zeros. Every thread of kThreads takes
// part; it writes chunk tid % chunks of rows tid / chunks + i * (kThreads / chunks).
template <class T, int W, int kRows, int kThreads, class Valid>
PERFORMER_DEVICE void CopyRows(T* tile, const T* from, int64_t stride, int width, bool aligned,
                               int tid, Valid valid) {
  constexpr int kChunks = W / kChunk<T>, kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0, "each thread copies as much");
  tid = Opaque(tid);
  const int column = tid % kChunks * kChunk<T>;
#pragma unroll 4
  for (int row = tid / kChunks; row < kRows; row += kStep) {
    const bool ok = column < width && valid(row);
    T* to = tile + At<T, W>(row, column);
    const T* source = from + (ok ? row * stride + column : 0);
    if (aligned) {
      CpAsync16(to, source, ok);
    } else {
#pragma unroll 1
      for (int i = 0; i < kChunk<T>; ++i)
        to[i] = ok && column + i < width ? source[i] : FromFloat<T>(0.f);
    }
  }
}
// Rows that lie in memory as in the tile, [kRows][W], all of them valid.
template <class T, int W, int kRows, int kThreads>
PERFORMER_DEVICE void CopyWhole(T* tile, const T* from, int tid) {
  CopyRows<T, W, kRows, kThreads>(tile, from, W, W, true, tid, [](int) { return true; });
}

// Keys and values of one sequence and key/value head, a tile at a time, with the column bias of the
// log-features in units of root:
//   bias[j] = key_bias[j] / root - root |k_j|^2 / 2
// A masked key (key_bias -inf), or one past the end, is never read: key and value arrive as zeros
// and the bias is -inf.
//
// How a tile i comes, of a block that walks tiles in steps of one:
//   Publish(i)   what Fetch(i) brought becomes visible at the next barrier
//   Issue(i)     starts the copies; Fetch(i + 1) may follow
//   CpAsyncWait<0>(); Arrived(i); barrier; use
template <class T, int W, int kThreads, int kRows = kTile>
struct KeyStream {
  RowsOf<const T> key, value;
  const float* key_bias;  // of the sequence's first row, or the only one
  int bias_step;
  int64_t first_row, head;
  int64_t end;  // in the sequence: of the rows that this block takes
  Map map;
  float* raw;      // [2][kRows] in shared memory: key_bias as given, -inf past the end
  float* bias;     // [2][kRows]
  float next = 0;  // of thread tid < kRows: key_bias of key `tid` in the tile fetched last

  static constexpr int kSharedFloats = 4 * kRows;

  PERFORMER_DEVICE void Fetch(int64_t tile, int tid) {
    const int64_t row = tile * kRows + tid;
    if (tid < kRows) next = row < end ? key_bias[row * bias_step] : -kInfinity;
  }
  PERFORMER_DEVICE void Publish(int buffer, int tid) {
    if (tid < kRows) raw[buffer * kRows + tid] = next;
  }
  PERFORMER_DEVICE void Issue(int64_t tile, int buffer, T* keys, T* values, int tid) const {
    const float* mask = raw + buffer * kRows;
    const int64_t row = first_row + tile * kRows;
    const auto valid = [&](int r) { return mask[r] != -kInfinity; };
    CopyRows<T, W, kRows, kThreads>(keys, key.Row(row, head), key.stride(), key.width, key.aligned,
                                    tid, valid);
    CopyRows<T, W, kRows, kThreads>(values, value.Row(row, head), value.stride(), value.width,
                                    value.aligned, tid, valid);
    CpAsyncCommit();
  }
  // A thread reads only what it copied itself, so no barrier is needed before.
  PERFORMER_DEVICE void Arrived(int buffer, const T* keys, int tid) const {
    constexpr int kChunks = W / kChunk<T>, kStep = kThreads / kChunks;
    tid = Opaque(tid);
    const float norm_factor = map.key_norm ? 0.5f * map.root : 0.f;
#pragma unroll 2
    for (int row = tid / kChunks; row < kRows; row += kStep) {
      const T* chunk = keys + At<T, W>(row, tid % kChunks * kChunk<T>);
      float norm = 0;
#pragma unroll
      for (int i = 0; i < kChunk<T>; i += 2) {
        const float2 x = LoadPair(chunk + i);
        norm += x.x * x.x + x.y * x.y;
      }
#pragma unroll
      for (int lanes = 1; lanes < kChunks; lanes *= 2)
        norm += __shfl_xor_sync(kAllLanes, norm, lanes);
      if (tid % kChunks == 0) {
        const float given = raw[buffer * kRows + row] * map.inverse_root;
        bias[buffer * kRows + row] = map.key_norm ? given - norm_factor * norm : given;
      }
    }
  }
};

template <class T, int W, int kThreads, int kRows = kTile>
PERFORMER_DEVICE KeyStream<T, W, kThreads, kRows> MakeKeyStream(const RowsOf<const T>& key,
                                                                const RowsOf<const T>& value,
                                                                const KeyBias& bias, const Map& map,
                                                                const Item& item, bool packed,
                                                                int64_t head, float* shared) {
  const int64_t batch = packed ? 0 : item.sequence, row = packed ? item.first_row : 0;
  return {key,
          value,
          bias.data + batch * bias.batch_step + head * bias.head_step + row * bias.step,
          bias.step,
          item.first_row,
          head,
          item.end,
          map,
          shared,
          shared + 2 * kRows};
}

}  // namespace cuda
}  // namespace performer
