// Products with one triangle of a pairwise matrix. Row r uses the columns up to r (a query and its
// keys) or those from r on (a key and its queries). No entry on the other side of the diagonal is
// multiplied with anything, so that what it holds, even NaN, reaches no result.
#pragma once
#include "cpu/simd/tile.h"

PERFORMER_ISA_BEGIN

// to[r][c] = a[r] . b[:, c] for begin <= c <= begin + r. Of the other entries some are written. Rows
// of `to` hold whole vectors.
template <class In, class T>
PERFORMER_NOINLINE void LowerProduct(const In* a, int64_t lda, const In* b, int64_t ldb,
                                     int64_t depth, int64_t rows, int64_t begin, T* to,
                                     int64_t ldto) {
  constexpr int64_t kCols = kTileVecs * kLanes<T>;
  const int64_t width = (begin + rows + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  for (int64_t c0 = begin / kLanes<T> * kLanes<T>; c0 < width; c0 += kCols) {
    const int64_t first = c0 > begin ? (c0 - begin) / kTileRows * kTileRows : 0;
    ForTiles<T>(rows - first, width - c0 < kCols ? width - c0 : kCols,
                [&](auto& tile, int64_t r, int64_t c) PERFORMER_TILE_BODY {
                  tile.Zero();
                  tile.Multiply(a + (first + r) * lda, lda, 1, b + c0 + c, ldb, depth);
                  tile.StoreTo(to + (first + r) * ldto + c0 + c, ldto);
                });
  }
}

// to[r][c] = a[r] . b[:, c] for c >= r, n x n. Of the other entries some are written.
template <class In, class T>
PERFORMER_NOINLINE void UpperProduct(const In* a, int64_t lda, const In* b, int64_t ldb,
                                     int64_t depth, int64_t n, T* to, int64_t ldto) {
  constexpr int64_t kCols = kTileVecs * kLanes<T>;
  const int64_t width = (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  for (int64_t c0 = 0; c0 < width; c0 += kCols) {
    const int64_t cols = width - c0 < kCols ? width - c0 : kCols, last = c0 + cols;
    ForTiles<T>(last < n ? last : n, cols,
                [&](auto& tile, int64_t r, int64_t c) PERFORMER_TILE_BODY {
                  tile.Zero();
                  tile.Multiply(a + r * lda, lda, 1, b + c0 + c, ldb, depth);
                  tile.StoreTo(to + r * ldto + c0 + c, ldto);
                });
  }
}

// to[rows][cols] = a b + tril(pair) x, with pair [rows][rows] and x [rows][cols].
template <class In, class T>
PERFORMER_NOINLINE void CausalProduct(const In* a, int64_t lda, const In* b, int64_t ldb,
                                      int64_t depth, const T* pair, int64_t ldp, const T* x,
                                      int64_t ldx, T* to, int64_t ldto, int64_t rows,
                                      int64_t cols) {
  ForTiles<T>(rows, cols, [&](auto& tile, int64_t r, int64_t c) PERFORMER_TILE_BODY {
    tile.Zero();
    tile.Multiply(a + r * lda, lda, 1, b + c, ldb, depth);
    tile.Multiply(pair + r * ldp, ldp, 1, x + c, ldx, r);
    tile.MultiplyLower(pair + r * ldp + r, ldp, x + r * ldx + c, ldx);
    tile.StoreTo(to + r * ldto + c, ldto);
  });
}

// to[n][cols] += triu(pair) x, with pair [n][n] and x [n][cols].
template <class T>
PERFORMER_NOINLINE void AddReverseCausalProduct(const T* pair, int64_t ldp, const T* x, int64_t ldx,
                                                T* to, int64_t ldto, int64_t n, int64_t cols) {
  ForTiles<T>(n, cols, [&](auto& tile, int64_t r, int64_t c) PERFORMER_TILE_BODY {
    const int64_t below = r + tile.kRows;
    tile.LoadFrom(to + r * ldto + c, ldto);
    tile.MultiplyUpper(pair + r * ldp + r, ldp, 1, x + r * ldx + c, ldx);
    tile.Multiply(pair + r * ldp + below, ldp, 1, x + below * ldx + c, ldx, n - below);
    tile.StoreTo(to + r * ldto + c, ldto);
  });
}

PERFORMER_ISA_END
