// How rows of tensors are copied into tiles in shared memory: plain rows, and the stream of keys
// and values with its masks.
#pragma once
#include "cuda/device/kernel_params.cuh"

namespace performer {
namespace cuda {

inline constexpr int kTile = 64;  // tokens of a tile

// Starts copying kRows rows, from row `first` of those at `from` on, into a tile; the rest of each
// tile row becomes zero. Rows for which valid(row in the tile) is false are not read: they arrive
// as zeros. Each of kThreads threads writes chunk tid % kChunks of rows tid / kChunks + i kStride.
template <class T, int W, int kRows, int kThreads, class Valid>
PERFORMER_DEVICE void CopyRows(T* tile, const T* from, int first, const RowsOf<const T>& rows,
                               int tid, Valid valid) {
  constexpr int kChunks = W / kChunk<T>, kStride = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kStride == 0, "each thread copies as much");
  tid = Opaque(tid);
  const int column = tid % kChunks * kChunk<T>;
  const int64_t stride = rows.stride;
  const int first_row = tid / kChunks;
#pragma unroll 4
  for (int n = 0; n < kRows / kStride; ++n) {
    const int row = first_row + n * kStride;
    const bool ok = column < rows.width && valid(row);
    T* to = tile + At<T, W>(row, column);
    const T* source = from + (ok ? (first + row) * stride + column : 0);
    if (rows.aligned) {
      CpAsync16(to, source, ok);
    } else {
#pragma unroll 1
      for (int i = 0; i < kChunk<T>; ++i)
        to[i] = ok && column + i < rows.width ? source[i] : FromFloat<T>(0.f);
    }
  }
}
// Starts copying rows that lie in memory as in the tile, [kRows][W]. Those from `rows` on become
// zeros.
template <class T, int W, int kRows, int kThreads>
PERFORMER_DEVICE void CopyOperand(T* tile, const T* from, int rows, int tid) {
  constexpr int kChunks = W / kChunk<T>, kStride = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kStride == 0, "each thread copies as much");
  tid = Opaque(tid);
  const int column = tid % kChunks * kChunk<T>;
#pragma unroll 4
  for (int row = tid / kChunks; row < kRows; row += kStride) {
    const bool ok = row < rows;
    CpAsync16(tile + At<T, W>(row, column), from + (ok ? row * W + column : 0), ok);
  }
}
// All of these rows; or, if kColumns < W, their columns from `from` on, to a tile [kRows][kColumns].
template <class T, int W, int kRows, int kThreads, int kColumns = W>
PERFORMER_DEVICE void CopyOperand(T* tile, const T* from, int tid) {
  constexpr int kChunks = kColumns / kChunk<T>, kStride = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kStride == 0, "each thread copies as much");
  tid = Opaque(tid);
  const int column = tid % kChunks * kChunk<T>, first_row = tid / kChunks;
  const T* const source = from + first_row * W + column;
#pragma unroll 4
  for (int n = 0; n < kRows / kStride; ++n)
    CpAsync16(tile + At<T, kColumns>(first_row + n * kStride, column), source + n * kStride * W,
              true);
}

// visit(row, |row|^2), by one thread for each row of a tile that CopyRows has filled. A thread reads
// only the numbers that it copied itself, so no barrier is needed before.
template <class T, int W, int kRows, int kThreads, class Visit>
PERFORMER_DEVICE void VisitSquaredNorms(const T* tile, int tid, Visit visit) {
  constexpr int kChunks = W / kChunk<T>, kStride = kThreads / kChunks;
  static_assert(kRows % kStride == 0, "lanes exchange sums: all must come here as often");
  tid = Opaque(tid);
  const int first_row = tid / kChunks;
#pragma unroll 2
  for (int n = 0; n < kRows / kStride; ++n) {
    const int row = first_row + n * kStride;
    const T* chunk = tile + At<T, W>(row, tid % kChunks * kChunk<T>);
    float norm = 0;
#pragma unroll
    for (int i = 0; i < kChunk<T>; i += 2) {
      const float2 x = LoadPair(chunk + i);
      norm += x.x * x.x + x.y * x.y;
    }
#pragma unroll
    for (int lanes = 1; lanes < kChunks; lanes *= 2)
      norm += __shfl_xor_sync(kAllLanes, norm, lanes);
    if (tid % kChunks == 0) visit(row, norm);
  }
}

// The pointers of a block. They are kept in shared memory, because registers are short and they are
// used once a tile. Rows start at the block's first row.
template <class T>
struct KeyPointers {
  const T *key, *value;  // [rows, G, D or E], at the block's head
  const float* bias;     // key_bias [1 or rows]
  int rows;              // of the block
};

// Keys and values of one sequence and key/value head, a tile at a time, with the column bias of the
// log-features in units of root:
//   bias[j] = key_bias[j] / root - root |k_j|^2 / 2
// A masked key (key_bias -inf), or one past the end, is never read: key and value arrive as zeros
// and the bias is -inf.
//
// A block that walks tiles 0, 1, ... does for tile i:
//   LoadKeyBias(i)       its key_bias to a register, a tile ahead
//   StoreKeyBias(i)      to shared memory; visible at the next barrier
//   Issue(i)             starts the copies of keys and values; LoadKeyBias(i + 1) may follow
//   CpAsyncWait<0>()
//   ComputeBias(i)       visible, with the keys and values, at the next barrier
// buffer is i % 2, or 0 where tiles come one at a time, for which one buffer is enough.
template <class T, int W, int kThreads, int kRows = kTile, int kBuffers = 2>
struct KeyStream {
  const KeyParams<T>& p;
  const KeyPointers<T>* pointers;
  float* key_bias;  // [kBuffers][kRows] in shared memory: key_bias as given, -inf past the end
  float* bias;      // [kBuffers][kRows]
  float next = 0;   // of thread tid < kRows: key_bias of key `tid` in the tile loaded last

  static constexpr int kFloats = 2 * kBuffers * kRows;
  static constexpr int kSharedBytes = kFloats * sizeof(float) + sizeof(KeyPointers<T>);

  // Every thread of the block; ends with a barrier.
  PERFORMER_DEVICE KeyStream(const KeyParams<T>& p, const Map& map, const WorkTile& work,
                             int64_t head, unsigned char* shared, int tid)
      : p(p),
        pointers(reinterpret_cast<KeyPointers<T>*>(shared + kFloats * sizeof(float))),
        key_bias(reinterpret_cast<float*>(shared)),
        bias(key_bias + kBuffers * kRows),
        map_(map) {
    if (tid == 0) {
      const int64_t batch = p.packed ? 0 : work.sequence;
      const int64_t row = work.begin + (p.packed ? work.first_row : 0);
      *const_cast<KeyPointers<T>*>(pointers) = {
          p.key.Row(work.first_row + work.begin, head),
          p.value.Row(work.first_row + work.begin, head),
          p.bias.data + batch * p.bias.batch_step + head * p.bias.head_step + row * p.bias.step,
          static_cast<int>(work.end - work.begin)};
    }
    __syncthreads();  // the pointers are visible
  }

  // Whether the block has a tile.
  PERFORMER_DEVICE bool exists(int tile) const { return tile * kRows < pointers->rows; }

  PERFORMER_DEVICE void LoadKeyBias(int tile, int tid) {
    const int row = tile * kRows + tid;
    if (tid < kRows)
      next = row < pointers->rows ? pointers->bias[static_cast<int64_t>(row) * p.bias.step]
                                  : -kInfinity;
  }
  PERFORMER_DEVICE void StoreKeyBias(int buffer, int tid) {
    if (tid < kRows) key_bias[buffer * kRows + tid] = next;
  }
  PERFORMER_DEVICE void Issue(int tile, int buffer, T* keys, T* values, int tid) const {
    Copy(p.key, pointers->key, tile, buffer, keys, tid);
    Copy(p.value, pointers->value, tile, buffer, values, tid);
    CpAsyncCommit();
  }
  // Starts the copy of the keys, or values, of a tile: rows of the pointers.
  PERFORMER_DEVICE void Copy(const RowsOf<const T>& rows, const T* from, int tile, int buffer,
                             T* to, int tid) const {
    const float* mask = key_bias + buffer * kRows;
    CopyRows<T, W, kRows, kThreads>(to, from, tile * kRows, rows, tid,
                                    [&](int row) { return mask[row] != -kInfinity; });
  }
  PERFORMER_DEVICE void ComputeBias(int buffer, const T* keys, int tid) const {
    const float norm_factor = 0.5f * map_.root;
    VisitSquaredNorms<T, W, kRows, kThreads>(keys, tid, [&](int row, float norm) {
      const float given = key_bias[buffer * kRows + row] * map_.inverse_root;
      bias[buffer * kRows + row] = map_.key_norm ? given - norm_factor * norm : given;
    });
  }

 private:
  const Map& map_;
};

}  // namespace cuda
}  // namespace performer
