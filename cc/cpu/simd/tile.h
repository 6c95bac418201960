// The matrix product that all kernels use. A tile of R rows x NV vectors of accumulators stays in
// registers; elements of the left operand are broadcast and may have any strides; rows of the right
// operand are contiguous.
#pragma once
#include <type_traits>

#include "cpu/simd/vector.h"

PERFORMER_ISA_BEGIN

template <class T, int R, int NV>
struct Tile {
  static constexpr int kRows = R, kVecs = NV, kCols = NV * kLanes<T>;
  Vec<T> v[R][NV];

  PERFORMER_INLINE void Zero() {
    ForEach([](int, int, Vec<T>& x) { x = Vec<T>{}; });
  }
  // v[r][:] += sum_k a[r * row_stride + k * depth_stride] * b[k * ldb + :]. In is T, or Pair with
  // two terms in each element.
  template <class In>
  PERFORMER_INLINE void Multiply(const In* a, int64_t row_stride, int64_t depth_stride, const In* b,
                                 int64_t ldb, int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, a += depth_stride, b += ldb) Rank1<0, R>(a, row_stride, b);
  }
  // The triangular end of a causal product: row r takes k <= r only, so that an earlier row never
  // touches a later row of b.
  PERFORMER_INLINE void MultiplyLower(const T* a, int64_t row_stride, const T* b, int64_t ldb) {
    Triangle<true, 0>(a, row_stride, 1, b, ldb);
  }
  // Its mirror image: row r takes k >= r only.
  PERFORMER_INLINE void MultiplyUpper(const T* a, int64_t row_stride, int64_t depth_stride,
                                      const T* b, int64_t ldb) {
    Triangle<false, 0>(a, row_stride, depth_stride, b, ldb);
  }
  PERFORMER_INLINE void LoadFrom(const T* from, int64_t stride) {
    ForEach([&](int r, int j, Vec<T>& x) { x = Load(from + r * stride + j * kLanes<T>); });
  }
  PERFORMER_INLINE void StoreTo(T* to, int64_t stride) {
    ForEach([&](int r, int j, Vec<T> x) { Store(to + r * stride + j * kLanes<T>, x); });
  }
  // Calls f(r, j, v[r][j]). Without explicit unrolling GCC keeps the tile in memory.
  template <class F>
  PERFORMER_INLINE void ForEach(F f) {
    PERFORMER_UNROLL
    for (int r = 0; r < R; ++r) PERFORMER_UNROLL
    for (int j = 0; j < NV; ++j) f(r, j, v[r][j]);
  }

 private:
  template <int kBegin, int kEnd, class In>
  PERFORMER_INLINE void Rank1(const In* a, int64_t row_stride, const In* b) {
    decltype(Load(b)) bv[NV];
    PERFORMER_UNROLL
    for (int j = 0; j < NV; ++j) bv[j] = Load(b + j * kLanes<T>);
    PERFORMER_UNROLL
    for (int r = kBegin; r < kEnd; ++r) {
      const auto av = Splat(a[r * row_stride]);
      PERFORMER_UNROLL
      for (int j = 0; j < NV; ++j) v[r][j] = MultiplyAdd(av, bv[j], v[r][j]);
    }
  }
  template <bool kLower, int k>
  PERFORMER_INLINE void Triangle(const T* a, int64_t row_stride, int64_t depth_stride, const T* b,
                                 int64_t ldb) {
    if constexpr (k < R) {
      if constexpr (kLower) {
        Rank1<k, R>(a + k * depth_stride, row_stride, b + k * ldb);
      } else {
        Rank1<0, k + 1>(a + k * depth_stride, row_stride, b + k * ldb);
      }
      Triangle<kLower, k + 1>(a, row_stride, depth_stride, b, ldb);
    }
  }
};

namespace tile_internal {
// body(tile) with a Tile<T, rows, NV> for a run-time number of rows <= R.
template <class T, int R, int NV, class Body>
PERFORMER_INLINE void WithRows(int64_t rows, Body body) {
  if constexpr (R > 0) {
    if (rows == R) {
      Tile<T, R, NV> tile;
      body(tile);
    } else {
      WithRows<T, R - 1, NV>(rows, body);
    }
  }
}
template <class T, int NV, class Body>
PERFORMER_INLINE void RowBlocks(int64_t rows, int64_t c, Body body) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) {
    Tile<T, kTileRows, NV> tile;
    body(tile, r, c);
  }
  if (r < rows)
    WithRows<T, kTileRows - 1, NV>(rows - r,
                                   [&](auto& tile) PERFORMER_TILE_BODY { body(tile, r, c); });
}
template <class T, int NV, class Body>
PERFORMER_INLINE void LastColumns(int64_t vecs, int64_t rows, int64_t c, Body body) {
  if constexpr (NV > 0) {
    if (vecs == NV) {
      RowBlocks<T, NV>(rows, c, body);
    } else {
      LastColumns<T, NV - 1>(vecs, rows, c, body);
    }
  }
}
}  // namespace tile_internal

// body(tile, r, c) for every tile of a rows x cols matrix, column by column of tiles. cols is a
// multiple of the lanes.
template <class T, class Body>
PERFORMER_INLINE void ForTiles(int64_t rows, int64_t cols, Body body) {
  constexpr int kCols = kTileVecs * kLanes<T>;
  int64_t c = 0;
  for (; c + kCols <= cols; c += kCols) tile_internal::RowBlocks<T, kTileVecs>(rows, c, body);
  if (c < cols) tile_internal::LastColumns<T, kTileVecs - 1>((cols - c) / kLanes<T>, rows, c, body);
}

// Terms of a sum between two calls of a hook. As it is called often, its memory accesses do not
// come in bursts.
constexpr int64_t kHookStride = 8;
// How often a product [rows][depth] [depth][cols] calls hook->Before().
template <class T>
constexpr int64_t HookCalls(int64_t rows, int64_t depth, int64_t cols) {
  constexpr int64_t kCols = kTileVecs * kLanes<T>;
  return (rows + kTileRows - 1) / kTileRows * ((depth + kHookStride - 1) / kHookStride) *
         ((cols + kCols - 1) / kCols);
}

// c[rows][cols] = A B, or += with kAdd, where A[r][k] is a[r * row_stride + k * depth_stride]. A
// hook, if there is one, is called between terms, hook->Before(), and with the results of every
// tile, hook->After(tile, r, c). Products of pairs are multiplied by `scale`. The bits of an entry
// depend only on its row of A and its column of B, not on its place in the matrix.
template <bool kAdd, class In, class T, class Hook = void>
PERFORMER_NOINLINE void MatMul(const In* a, int64_t row_stride, int64_t depth_stride, const In* b,
                               int64_t ldb, int64_t depth, T* c, int64_t ldc, int64_t rows,
                               int64_t cols, Hook* hook = nullptr, T scale = 1) {
  ForTiles<T>(rows, cols, [&](auto& tile, int64_t r0, int64_t c0) PERFORMER_TILE_BODY {
    T* out = c + r0 * ldc + c0;
    tile.Zero();
    if constexpr (std::is_void_v<Hook>) {
      tile.Multiply(a + r0 * row_stride, row_stride, depth_stride, b + c0, ldb, depth);
    } else {
      for (int64_t k = 0; k < depth; k += kHookStride) {
        hook->Before();
        tile.Multiply(a + r0 * row_stride + k * depth_stride, row_stride, depth_stride,
                      b + k * ldb + c0, ldb, depth - k < kHookStride ? depth - k : kHookStride);
      }
    }
    if constexpr (!std::is_same_v<In, T>) tile.ForEach([&](int, int, Vec<T>& x) { x *= scale; });
    if constexpr (kAdd)
      tile.ForEach([&](int r, int j, Vec<T>& x) { x = Load(out + r * ldc + j * kLanes<T>) + x; });
    if constexpr (!std::is_void_v<Hook>) hook->After(tile, r0, c0);
    tile.StoreTo(out, ldc);
  });
}

// to[rows][cols] = from + A B; `from` may be `to`.
template <class In, class T>
PERFORMER_NOINLINE void AddProduct(const In* a, int64_t row_stride, int64_t depth_stride,
                                   const In* b, int64_t ldb, int64_t depth, const T* from, T* to,
                                   int64_t ldto, int64_t rows, int64_t cols) {
  ForTiles<T>(rows, cols, [&](auto& tile, int64_t r0, int64_t c0) PERFORMER_TILE_BODY {
    const T* add = from + r0 * ldto + c0;
    tile.Zero();
    tile.Multiply(a + r0 * row_stride, row_stride, depth_stride, b + c0, ldb, depth);
    tile.ForEach([&](int r, int j, Vec<T>& x) { x = Load(add + r * ldto + j * kLanes<T>) + x; });
    tile.StoreTo(to + r0 * ldto + c0, ldto);
  });
}

PERFORMER_ISA_END
