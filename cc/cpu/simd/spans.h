// Products of a row of weights with rows that lie in several places, as those of near keys and of
// features do. A span may end in a triangle: row r of the weights takes the rows up to `count` + r
// only, so that what the others hold, even NaN, reaches no result.
#pragma once
#include "cpu/simd/tile.h"

PERFORMER_ISA_BEGIN

template <class T>
struct Span {
  int64_t column;  // where its weights begin in a row
  const T* rows;   // [count (+ rows of the weights)][width of the result]
  int64_t count;   // rows that every row of the weights takes
  bool triangle;   // then row r takes r + 1 more
};

// The spans of a row of weights, at most four.
template <class T>
struct Spans {
  Span<T> span[4];
  int count = 0;

  void Add(int64_t column, const T* rows, int64_t n, bool triangle) {
    if (n > 0 || triangle) span[count++] = {column, rows, n, triangle};
  }
};

// to[rows][cols] = factor[row] * sum over the spans of weights times rows; 0 where the factor is.
// factor [rows] may be nullptr. Rows of the spans are `cols` long, a multiple of the lanes.
template <class T>
PERFORMER_NOINLINE void SpanProduct(const T* weights, int64_t stride, const Spans<T>& spans,
                                    const T* factor, T* to, int64_t ldto, int64_t rows,
                                    int64_t cols) {
  ForTiles<T>(rows, cols, [&](auto& tile, int64_t r, int64_t c) PERFORMER_TILE_BODY {
    tile.Zero();
    for (int i = 0; i < spans.count; ++i) {
      const Span<T>& span = spans.span[i];
      const T *a = weights + r * stride + span.column, *b = span.rows + c;
      const int64_t whole = span.count + (span.triangle ? r : 0);
      tile.Multiply(a, stride, 1, b, cols, whole);
      if (span.triangle) tile.MultiplyLower(a + whole, stride, b + whole * cols, cols);
    }
    if (factor)
      tile.ForEach(
          [&](int i, int, Vec<T>& x) { x = factor[r + i] == 0 ? Vec<T>{} : x * factor[r + i]; });
    tile.StoreTo(to + r * ldto + c, ldto);
  });
}

// The transpose: rows of one span += weights^T x, with x [rows][cols].
template <class T>
PERFORMER_NOINLINE void AddTransposedProduct(const T* weights, int64_t stride, int64_t rows,
                                             int64_t count, bool triangle, const T* x, T* to,
                                             int64_t cols) {
  ForTiles<T>(count, cols, [&](auto& tile, int64_t r, int64_t c) PERFORMER_TILE_BODY {
    tile.LoadFrom(to + r * cols + c, cols);
    tile.Multiply(weights + r, 1, stride, x + c, cols, rows);
    tile.StoreTo(to + r * cols + c, cols);
  });
  if (!triangle) return;
  const T* square = weights + count;
  T* end = to + count * cols;
  ForTiles<T>(rows, cols, [&](auto& tile, int64_t r, int64_t c) PERFORMER_TILE_BODY {
    const int64_t below = r + tile.kRows;
    tile.LoadFrom(end + r * cols + c, cols);
    tile.MultiplyUpper(square + r * stride + r, 1, stride, x + r * cols + c, cols);
    tile.Multiply(square + below * stride + r, 1, stride, x + below * cols + c, cols, rows - below);
    tile.StoreTo(end + r * cols + c, cols);
  });
}

PERFORMER_ISA_END
