// Causal attention: out[i] = sum_{j <= i} A[i, j] v[j] / sum_{j <= i} A[i, j], in chunks, with a
// running state.
//
// Features of keys are made transposed ([M][C]), so that both f kb and kb v stream rows of B:
//   kb[m][j] = 2^(b - anchor[m])      f[i][m] = 2^(a + anchor - shift_i)      local = tril(f kb)
//   out = (f sum + local v) / (f mass + row sums of local)      then sum += kb v, mass += row sums
//   of kb
//
// Why no later key changes a bit of an earlier row: boundaries of chunks are fixed; a chunk is
// processed in pieces, nearly always one. The anchors of a piece come from the past and from the
// key of its first row, and a piece ends before any later key that exceeds an anchor by more than
// kCutBits, so that rows before the cut do the same arithmetic either way. Products end at their
// row (triangle.h).
#pragma once
#include "core/chunks.h"
#include "cpu/features.h"
#include "cpu/read.h"
#include "cpu/triangle.h"

PERFORMER_ISA_BEGIN

template <class Acc>
constexpr Acc kCutBits = 43;  // 30 nats above an anchor
template <class Acc>
constexpr Acc kRenewMass =
    static_cast<Acc>(0x1p30);  // an anchor is renewed when the mass relative to it passes this

// The prefix state as sums relative to 2^anchor; an anchor of -inf means nothing yet.
template <class Acc>
struct PrefixState {
  Acc *sum, *mass, *anchor;  // [m][e_pad], [m_pad], [m_pad]

  void Place(Arena& arena, const Widths& w) {
    sum = arena.Take<Acc>(w.m * w.e_pad);
    mass = arena.Take<Acc>(w.m_pad);
    anchor = arena.Take<Acc>(w.m_pad);
  }
  void Set(const LoadedState<Acc>& state, const Widths& w) {
    state.CopyMean(w, sum);
    for (int64_t m = 0; m < w.m_pad; ++m) {
      anchor[m] = m < w.m ? state.log_mass[m] * kLog2e<Acc> : kInf<Acc>;
      mass[m] = m < w.m && anchor[m] != -kInf<Acc> ? 1 : 0;
    }
  }
  bool Empty(const Widths& w) const {
    for (int64_t m = 0; m < w.m; ++m)
      if (anchor[m] != -kInf<Acc>) return false;
    return true;
  }
  void Raise(int64_t m, Acc to, const Widths& w) {
    const Acc keep = Exp2(anchor[m] - to);  // 0 where the anchor was -inf
    Acc* row = sum + m * w.e_pad;
    for (int64_t e = 0; e < w.e_pad; e += kLanes<Acc>) Store(row + e, Load(row + e) * keep);
    mass[m] *= keep;
    anchor[m] = to;
  }
};

// Rows of a chunk that are processed with the same anchors.
struct Piece {
  int64_t begin, end;
};

template <class Acc>
struct CausalScratch {
  static constexpr int64_t C = kCausalChunk, kLocalStride = C + kPad<Acc>;
  static_assert(C % kPad<Acc> == 0);
  Ahead ahead;
  KeyChunk<Acc> keys;
  PrefixState<Acc> state;
  Acc *kt, *b, *kb, *piece_mass;  // [d][C], [m][C], [m][C], [m]
  Acc *q, *f, *local, *out, *bias, *tops, *shift,
      *den;  // [C][d_pad], [C][m_stride], [C][kLocalStride], [C][e_pad], [m_pad], [C], [C]

  void Place(Arena& arena, const Widths& w) {
    keys.Place(arena, w, C);
    state.Place(arena, w);
    kt = arena.Take<Acc>(w.d_pad * C);
    b = arena.Take<Acc>(w.m * C);
    kb = arena.Take<Acc>(w.m * C);
    piece_mass = arena.Take<Acc>(w.m);
    q = arena.Take<Acc>(C * w.d_pad);
    f = arena.Take<Acc>(C * w.m_stride);
    local = arena.Take<Acc>(C * kLocalStride);
    out = arena.Take<Acc>(C * w.e_pad);
    bias = arena.Take<Acc>(w.m_pad);
    tops = arena.Take<Acc>(C * kLanes<Acc>);
    shift = arena.Take<Acc>(C);
    den = arena.Take<Acc>(C);
  }
};

// b[m][j] of the chunk's keys; columns from n on, as far as vectors reach, are -inf.
template <class Acc>
void CausalLogFeatures(const Map<Acc>& map, const PackedProjection<Acc>& projection,
                       const Widths& w, int64_t n, CausalScratch<Acc>& s) {
  constexpr int64_t C = CausalScratch<Acc>::C;
  const int64_t width = RoundUp(n, kLanes<Acc>);
  for (int64_t j = n; j < RoundUp(n, kPad<Acc>); ++j) {
    s.keys.offset[j] = -kInf<Acc>;
    s.keys.skip[j] = 1;
    for (int64_t d = 0; d < w.d_pad; ++d) s.keys.k[j * w.d_pad + d] = 0;
  }
  Transpose(s.keys.k, w.d_pad, RoundUp(width, 4), w.d_pad, s.kt, C);
  s.ahead.Divide(RoundUp(w.m, kTileRows) / kTileRows);
  MatMul<false>(projection.base2_rows, w.d_pad, 1, s.kt, C, w.d, s.b, C, w.m, width, &s.ahead);
  ApplyMap<Acc>(map, w.m, width, C, s.b, nullptr);
  for (int64_t m = 0; m < w.m; ++m)
    for (int64_t j = 0; j < width; j += kLanes<Acc>)
      Store(s.b + m * C + j, Load(s.b + m * C + j) + Load(s.keys.offset + j));
}

// Sets the anchors for a piece that begins at an unmasked row, from the past and that row.
template <class Acc>
void AnchorPiece(int64_t begin, const Widths& w, CausalScratch<Acc>& s) {
  const Acc* column = s.b + begin;
  bool exceeds = false;
  for (int64_t m = 0; m < w.m; ++m) exceeds |= column[m * s.C] > s.state.anchor[m] + kCutBits<Acc>;
  if (!exceeds) return;
  for (int64_t m = 0; m < w.m; ++m)
    if (column[m * s.C] > s.state.anchor[m]) s.state.Raise(m, column[m * s.C], w);
}

// The first row in (begin, n) whose key exceeds an anchor by more than kCutBits, or n.
template <class Acc>
int64_t PieceEnd(int64_t begin, int64_t n, const Widths& w, const CausalScratch<Acc>& s) {
  constexpr int64_t C = CausalScratch<Acc>::C, kVecs = C / kLanes<Acc>;
  IntVec<Acc> exceeds[kVecs] = {};
  for (int64_t m = 0; m < w.m; ++m) {
    const Vec<Acc> limit = Splat(s.state.anchor[m] + kCutBits<Acc>);
    for (int64_t i = 0; i < kVecs && i * kLanes<Acc> < n; ++i)
      exceeds[i] |= Load(s.b + m * C + i * kLanes<Acc>) > limit;
  }
  for (int64_t j = begin + 1; j < n; ++j)
    if (exceeds[j / kLanes<Acc>][j % kLanes<Acc>]) return j;
  return n;
}

// kb and its row sums for the columns of the piece; 0 in the others, as far as vectors reach,
// whatever these keys hold.
template <class Acc>
void PieceKeyWeights(Piece piece, const Widths& w, CausalScratch<Acc>& s) {
  constexpr int64_t C = CausalScratch<Acc>::C;
  alignas(kAlignment) Acc column[C];
  for (int64_t j = 0; j < C; ++j) column[j] = static_cast<Acc>(j);
  const Acc begin = static_cast<Acc>(piece.begin), end = static_cast<Acc>(piece.end);
  for (int64_t m = 0; m < w.m; ++m) {
    const Acc anchor = s.state.anchor[m] == -kInf<Acc> ? Acc(0) : s.state.anchor[m];
    Vec<Acc> sum = {};
    const Vec<Acc> zero = {};
    for (int64_t j = 0; j < piece.end; j += kLanes<Acc>) {
      const IntVec<Acc> inside = (Load(column + j) >= begin) & (Load(column + j) < end);
      const Vec<Acc> y = inside ? Exp2(Load(s.b + m * C + j) - anchor) : zero;
      Store(s.kb + m * C + j, y);
      sum += y;
    }
    s.piece_mass[m] = ReduceAdd<Acc>(sum);
  }
}

// local[i][j] = f[i] . kb[:, j] for the keys j <= piece.begin + i; den[i] += their sum.
template <class Acc>
void PieceLocal(Piece piece, const Widths& w, CausalScratch<Acc>& s) {
  constexpr int64_t C = CausalScratch<Acc>::C, kStride = CausalScratch<Acc>::kLocalStride;
  const int64_t rows = piece.end - piece.begin;
  LowerProduct(s.f, w.m_stride, s.kb, C, w.m, rows, piece.begin, s.local, kStride);
  for (int64_t i = 0; i < rows; ++i) {
    Acc* row = s.local + i * kStride;
    const int64_t last = piece.begin + i, stop = RoundUp(last + 1, kLanes<Acc>);
    for (int64_t j = last + 1; j < stop; ++j) row[j] = 0;
    Vec<Acc> sum = {};
    for (int64_t j = piece.begin / kLanes<Acc> * kLanes<Acc>; j < stop; j += kLanes<Acc>)
      sum += Load(row + j);
    s.den[i] += ReduceAdd<Acc>(sum);
  }
}

// Queries of one head for the rows of a piece; `row` is the tensor row of the piece's first.
template <class Acc>
void PieceQueries(const CausalParams& params, const Acc* projections, const Map<Acc>& map,
                  const Widths& w, int64_t query_head, int64_t row, Piece piece,
                  CausalScratch<Acc>& s) {
  constexpr int64_t kStride = CausalScratch<Acc>::kLocalStride;
  const int64_t rows = piece.end - piece.begin;
  const QueryHead<Acc> head(params.queries, projections, params.dims, w, query_head);
  LoadRows<Acc>({params.queries.query, params.dtype, params.dims.heads, query_head, w.d}, row, rows,
                nullptr, s.q, w.d_pad, &s.ahead);
  LogFeatures<Acc>(map, s.q, rows, head.projection.panels, w, s.f, nullptr, &s.ahead);
  SetBias(s.state.anchor, 1.0, head.feature_bias, w, s.bias);
  RowTops(rows, w, s.bias, s.f, s.tops);
  QueryWeights<true>(rows, w, s.bias, s.state.mass, s.tops, s.f, s.shift, s.den);
  PieceLocal(piece, w, s);
  PrefixProduct(s.f, w.m_stride, s.state.sum, w.e_pad, w.m, s.local + piece.begin, kStride,
                s.keys.v + piece.begin * w.e_pad, w.e_pad, s.out, w.e_pad, rows, w.e_pad);
  ScaleRows(rows, w.e_pad, s.den, s.out);
  StoreRows<Acc>({params.out, params.dtype, params.dims.heads, query_head, w.e}, row, rows, s.out,
                 w.e_pad);
}

// Adds the keys of a piece to the state.
template <class Acc>
void PieceUpdate(Piece piece, const Widths& w, CausalScratch<Acc>& s) {
  PrefixState<Acc>& state = s.state;
  MatMul<true>(s.kb + piece.begin, s.C, 1, s.keys.v + piece.begin * w.e_pad, w.e_pad,
               piece.end - piece.begin, state.sum, w.e_pad, w.m, w.e_pad);
  for (int64_t m = 0; m < w.m; ++m) {
    state.mass[m] += s.piece_mass[m];
    if (state.mass[m] > kRenewMass<Acc>) state.Raise(m, state.anchor[m] + Log2(state.mass[m]), w);
  }
}

// Rows that see no key give 0.
template <class Acc>
void ZeroOut(const CausalParams& params, const Widths& w, int64_t group, int64_t row, int64_t rows,
             CausalScratch<Acc>& s) {
  for (int64_t i = 0; i < rows * w.e_pad; ++i) s.out[i] = 0;
  for (int64_t h = group * GroupSize(params.dims); h < (group + 1) * GroupSize(params.dims); ++h)
    StoreRows<Acc>({params.out, params.dtype, params.dims.heads, h, w.e}, row, rows, s.out,
                   w.e_pad);
}

template <class Acc>
bool Causal(const CausalParams& params, const Acc* query_projection, const Acc* key_projection,
            Slice slice) {
  const Dims& dims = params.dims;
  const Widths w = MakeWidths<Acc>(dims);
  const Map<Acc> map(params);
  Arena arena;
  CausalScratch<Acc> s;
  s.Place(arena, w);
  if (!arena.Allocate()) return false;
  s.Place(arena, w);
  const int64_t index = params.keys.projection_heads == 1 ? 0 : slice.head;
  const auto projection =
      PackedProjection<Acc>::At(key_projection + index * PackedProjection<Acc>::Size(w), w);
  s.state.Set(LoadedState<Acc>(params.initial, dims, slice.sequence, slice.head), w);

  for (int64_t row = slice.begin; row < slice.end; row += s.C) {
    const int64_t n = slice.end - row < s.C ? slice.end - row : s.C;
    s.keys.Load(params, params.keys, map, w, slice, row, n, &s.ahead);
    CausalLogFeatures(map, projection, w, n, s);
    for (Piece piece = {0, 0}; piece.begin < n; piece.begin = piece.end) {
      if (s.keys.skip[piece.begin] && s.state.Empty(w)) {
        piece.end = piece.begin + 1;
        while (piece.end < n && s.keys.skip[piece.end]) ++piece.end;
        ZeroOut(params, w, slice.head, row + piece.begin, piece.end - piece.begin, s);
        continue;
      }
      if (!s.keys.skip[piece.begin]) AnchorPiece(piece.begin, w, s);
      piece.end = PieceEnd(piece.begin, n, w, s);
      PieceKeyWeights(piece, w, s);
      for (int64_t h = slice.head * GroupSize(dims); h < (slice.head + 1) * GroupSize(dims); ++h)
        PieceQueries(params, query_projection, map, w, h, row + piece.begin, piece, s);
      PieceUpdate(piece, w, s);
    }
  }
  const int64_t at = (slice.sequence * dims.groups + slice.head) * w.m;
  WriteState(w, s.state.anchor, s.state.mass, s.state.sum,
             static_cast<Acc*>(params.state.log_mass) + at,
             static_cast<Acc*>(params.state.mean) + at * w.e);
  return true;
}

PERFORMER_ISA_END
