// Gradient of causal attention in two sweeps over the pieces of causal.h; per row and head one
// normaliser is kept, never L x M.
//
// Forward sweep, with the prefix state (sum, mass) before the piece and cum[i] = mass + sum_{j <=
// i} kb[j]:
//   f = 2^(a + anchor - shift)   den = sum_m f cum   y = dout / den   P = tril(y v^T)
//   g = y sum^T + P kb           delta = sum_m f g   da = f (g - delta / den cum)
//   dq = da w                    dw += da^T q        lse = shift + log2 den, kept with delta
// Reverse sweep, with the suffix state R = sum over later rows of f dout, r = the same of f delta,
// relative to the anchors, which never fall along the sequence: going back, every factor 2^(anchor
// - later anchor) is <= 1. f = 2^(a + anchor - lse) is normalised here.
//   db = kb (v R^T - r + triu(v dout^T - delta) f)      dv = kb R + triu(kb f^T) dout
//   dk = db w - scale k sum_m db    dw += db^T k        then R += f^T dout, r += f^T delta
// The final state's gradient is the first suffix state; the initial state is a key that every row
// sees.
#pragma once
#include "cpu/bidirectional_grad.h"
#include "cpu/causal.h"

PERFORMER_ISA_BEGIN

template <class Acc>
struct CausalGradScratch {
  static constexpr int64_t C = kCausalGradChunk, kPairStride = C + kPad<Acc>;
  static_assert(C % kPad<Acc> == 0);
  KeyChunk<Acc> keys;
  // Keys of the piece: log-features, weights, running sums of weights, slopes.
  Acc *b, *kb, *cum, *key_slope;  // [C][m_stride]
  // Queries of the piece.
  Acc *q, *y, *f, *g, *query_slope, *dq, *dk, *dv;
  Acc *transposed, *f_transposed;  // [e_pad][C], [m_pad][C]
  Acc *pair, *weights;             // [C][kPairStride]
  Acc *tops, *shift, *den, *row_sum, *bias;
  // Prefix sums^T in the forward sweep [m_panels][e_pad][kPanel]; in the reverse sweep R^T, as
  // panels of `suffix`.
  Acc *panels, *suffix;  // suffix: R [m][e_pad]
  Acc *mass, *anchor, *saved,
      *initial_mean;  // mass: r in the reverse sweep; saved: r before the piece

  void Place(Arena& arena, const Map<Acc>& map, const Widths& w) {
    keys.Place(arena, w, C);
    for (Acc** rows : {&b, &kb, &cum, &f, &g}) *rows = arena.Take<Acc>(C * w.m_stride);
    for (Acc** rows : {&key_slope, &query_slope})
      *rows = map.linear() ? nullptr : arena.Take<Acc>(C * w.m_stride);
    for (Acc** rows : {&q, &dq, &dk}) *rows = arena.Take<Acc>(C * w.d_pad);
    for (Acc** rows : {&y, &dv}) *rows = arena.Take<Acc>(C * w.e_pad);
    transposed = arena.Take<Acc>(w.e_pad * C);
    f_transposed = arena.Take<Acc>(w.m_pad * C);
    for (Acc** pairs : {&pair, &weights}) *pairs = arena.Take<Acc>(C * kPairStride);
    tops = arena.Take<Acc>(C * kLanes<Acc>);
    for (Acc** column : {&shift, &den, &row_sum}) *column = arena.Take<Acc>(C);
    panels = arena.Take<Acc>(w.m_panels * kPanel * w.e_pad);
    for (Acc** state : {&suffix, &initial_mean}) *state = arena.Take<Acc>(w.m * w.e_pad);
    for (Acc** row : {&bias, &mass, &anchor, &saved}) *row = arena.Take<Acc>(w.m_pad);
  }
};

// A piece of the forward sweep, and the set of anchors it used.
struct GradPiece {
  int64_t row, chunk_begin, rows, anchors;
};

template <class Acc>
class CausalGradient {
 public:
  CausalGradient(const CausalGradParams& params, const Acc* query_projection,
                 const Acc* key_projection, Slice slice, Acc* key_bias,
                 CausalGradPartial<Acc> partial)
      : params_(params),
        dims_(params.dims),
        w_(MakeWidths<Acc>(params.dims)),
        map_(params),
        query_projection_(query_projection),
        key_projection_(PackedProjection<Acc>::At(
            key_projection + (params.keys.projection_heads == 1 ? 0 : slice.head) *
                                 PackedProjection<Acc>::Size(w_),
            w_)),
        slice_(slice),
        partial_(partial),
        key_rows_(params, params.grad_keys, slice, key_bias),
        initial_(params.initial, params.dims, slice.sequence, slice.head) {}

  bool Run() {
    Arena arena;
    s_.Place(arena, map_, w_);
    if (!arena.Allocate()) return false;
    s_.Place(arena, map_, w_);
    const int64_t rows = slice_.end - slice_.begin;
    lse_ = rows_.Append(2 * rows * GroupSize(dims_));
    if (lse_ == nullptr && rows > 0) return false;
    delta_ = lse_ + rows * GroupSize(dims_);
    for (int64_t i = 0; i < CausalGradPartial<Acc>::Size(w_, GroupSize(dims_)); ++i)
      partial_.log_mass[i] = 0;
    if (!ForwardSweep()) return false;
    ReverseSweep();
    return true;
  }

 private:
  using Scratch = CausalGradScratch<Acc>;
  static constexpr int64_t C = Scratch::C, kPairStride = Scratch::kPairStride;

  int64_t FirstHead() const { return slice_.head * GroupSize(dims_); }
  Acc* OfHead(Acc* rows, int64_t i, int64_t row) const {
    return rows + i * (slice_.end - slice_.begin) + row - slice_.begin;
  }
  QueryHead<Acc> Head(int64_t i) const {
    return {params_.queries, query_projection_, dims_, w_, FirstHead() + i};
  }

  // Log-features of the keys of a chunk, with offsets.
  void LoadKeys(int64_t row, int64_t n) {
    s_.keys.Load(params_, params_.keys, map_, w_, slice_, row, n, &ahead_);
    LogFeatures(map_, s_.keys.k, n, key_projection_.panels, w_, s_.b, s_.key_slope, &ahead_);
    for (int64_t j = 0; j < n; ++j)
      for (int64_t m = j * w_.m_stride; m < j * w_.m_stride + w_.m_pad; m += kLanes<Acc>)
        Store(s_.b + m, Load(s_.b + m) + s_.keys.offset[j]);
  }

  bool Exceeds(int64_t j) const {
    IntVec<Acc> any = {};
    for (int64_t m = 0; m < w_.m_pad; m += kLanes<Acc>)
      any |= Load(s_.b + j * w_.m_stride + m) > Load(s_.anchor + m) + kCutBits<Acc>;
    for (int l = 0; l < kLanes<Acc>; ++l)
      if (any[l]) return true;
    return false;
  }
  bool Empty() const {
    for (int64_t m = 0; m < w_.m; ++m)
      if (s_.anchor[m] != -kInf<Acc>) return false;
    return true;
  }
  // Column m of the panels, the prefix sum of landmark m, times keep.
  void ScalePrefix(int64_t m, Acc keep) {
    Acc* column = s_.panels + m / kPanel * kPanel * w_.e_pad + m % kPanel;
    for (int64_t e = 0; e < w_.e_pad; ++e) column[e * kPanel] *= keep;
    s_.mass[m] *= keep;
  }
  bool SaveAnchors() {
    Acc* set = anchors_.Append(w_.m_pad);
    if (set == nullptr) return false;
    for (int64_t m = 0; m < w_.m_pad; ++m) set[m] = s_.anchor[m];
    return true;
  }
  int64_t AnchorSets() const { return anchors_.size() / w_.m_pad; }

  void StartPrefix() {
    initial_.CopyMean(w_, s_.initial_mean);
    TransposeToPanels(s_.initial_mean, w_.m, w_.e_pad, w_.e_pad, s_.panels);
    for (int64_t m = 0; m < w_.m_pad; ++m) {
      s_.anchor[m] =
          m < w_.m ? initial_.log_mass[m] * kLog2e<Acc> : kInf<Acc>;  // the padding weighs nothing
      s_.mass[m] = m < w_.m && s_.anchor[m] != -kInf<Acc> ? 1 : 0;
    }
  }

  bool ForwardSweep() {
    StartPrefix();
    if (!SaveAnchors()) return false;
    for (int64_t row = slice_.begin; row < slice_.end; row += C) {
      const int64_t n = slice_.end - row < C ? slice_.end - row : C;
      LoadKeys(row, n);
      for (int64_t begin = 0, end; begin < n; begin = end) {
        end = begin + 1;
        if (s_.keys.skip[begin] && Empty()) {
          ZeroRows(row + begin);
          continue;
        }
        if (!s_.keys.skip[begin] && Exceeds(begin)) {
          RaisePrefix(s_.b + begin * w_.m_stride);
          if (!SaveAnchors()) return false;
        }
        while (end < n && !Exceeds(end)) ++end;
        GradPiece* piece = pieces_.Append(1);
        if (piece == nullptr) return false;
        *piece = {row + begin, begin, end - begin, AnchorSets() - 1};
        WeighKeys(*piece);
        for (int64_t i = 0; i < GroupSize(dims_); ++i) ForwardQueries(*piece, i);
        if (UpdatePrefix(*piece) && !SaveAnchors()) return false;
      }
    }
    return true;
  }

  // A row that sees no key.
  void ZeroRows(int64_t row) {
    for (int64_t d = 0; d < w_.d_pad; ++d) s_.dq[d] = s_.dk[d] = 0;
    for (int64_t e = 0; e < w_.e_pad; ++e) s_.dv[e] = 0;
    for (int64_t i = 0; i < GroupSize(dims_); ++i)
      StoreRows<Acc>(
          {params_.grad_queries.query, params_.dtype, dims_.heads, FirstHead() + i, w_.d}, row, 1,
          s_.dq, w_.d_pad);
    StoreRows(key_rows_.key, row, 1, s_.dk, w_.d_pad);
    StoreRows(key_rows_.value, row, 1, s_.dv, w_.e_pad);
    key_rows_.bias[row] = 0;
  }

  void RaisePrefix(const Acc* b) {
    for (int64_t m = 0; m < w_.m; ++m) {
      if (!(b[m] > s_.anchor[m])) continue;
      ScalePrefix(m, Exp2(s_.anchor[m] - b[m]));
      s_.anchor[m] = b[m];
    }
  }

  // kb and cum for the rows of the piece, which then begin at row 0 of these buffers.
  void WeighKeys(const GradPiece& piece) {
    const int64_t first = piece.chunk_begin * w_.m_stride;
    for (int64_t m = 0; m < w_.m_pad; m += kLanes<Acc>) {
      const Vec<Acc> given = Load(s_.anchor + m), zero = {};
      const Vec<Acc> anchor = given == -kInf<Acc> ? zero : given;
      Vec<Acc> sum = Load(s_.mass + m);
      for (int64_t j = 0; j < piece.rows; ++j) {
        const Vec<Acc> x = Exp2(Load(s_.b + first + j * w_.m_stride + m) - anchor);
        sum += x;
        Store(s_.kb + j * w_.m_stride + m, x);
        Store(s_.cum + j * w_.m_stride + m, sum);
      }
    }
  }
  const Acc* PieceValues(const GradPiece& piece) const {
    return s_.keys.v + piece.chunk_begin * w_.e_pad;
  }

  void LoadQueries(const GradPiece& piece, int64_t i) {
    const int64_t head = FirstHead() + i;
    LoadRows<Acc>({params_.queries.query, params_.dtype, dims_.heads, head, w_.d}, piece.row,
                  piece.rows, nullptr, s_.q, w_.d_pad, &ahead_);
    LoadRows<Acc>({params_.grad_out, params_.dtype, dims_.heads, head, w_.e}, piece.row, piece.rows,
                  nullptr, s_.y, w_.e_pad, &ahead_);
  }

  void ForwardQueries(const GradPiece& piece, int64_t i) {
    const QueryHead<Acc> head = Head(i);
    const int64_t n = piece.rows;
    LoadQueries(piece, i);
    LogFeatures(map_, s_.q, n, head.projection.panels, w_, s_.f, s_.query_slope, &ahead_);
    SetBias(s_.anchor, 1.0, head.feature_bias, w_, s_.bias);
    RowTops(n, w_, s_.bias, s_.f, s_.tops);
    QueryWeights<false, Acc>(n, w_, s_.bias, nullptr, s_.tops, s_.f, s_.shift, s_.den);
    for (int64_t r = 0; r < n; ++r)
      s_.den[r] = Dot(s_.f + r * w_.m_stride, s_.cum + r * w_.m_stride, w_.m_pad);
    ScaleRows(n, w_.e_pad, s_.den, s_.y);
    PrefixProducts(piece);
    LogitGradient(piece, i);
    ChainSlope(map_, n, w_, s_.query_slope, s_.g);
    MatMul<false>(s_.g, w_.m_stride, 1, head.projection.rows, w_.d_pad, w_.m, s_.dq, w_.d_pad, n,
                  w_.d_pad);
    StoreRows<Acc>({params_.grad_queries.query, params_.dtype, dims_.heads, FirstHead() + i, w_.d},
                   piece.row, n, s_.dq, w_.d_pad);
    MatMul<true>(s_.g, 1, w_.m_stride, s_.q, w_.d_pad, n,
                 partial_.query_projection + i * w_.m * w_.d_pad, w_.d_pad, w_.m, w_.d_pad);
  }

  // g = y sum^T + tril(y v^T) kb.
  void PrefixProducts(const GradPiece& piece) {
    const int64_t n = piece.rows;
    TransposeRows(PieceValues(piece), w_.e_pad, n, w_.e_pad, s_.transposed);
    LowerProduct(s_.y, w_.e_pad, s_.transposed, C, w_.e_pad, n, 0, s_.pair, kPairStride);
    for (int64_t m = 0; m < w_.m_pad; m += kPanel) {
      const int64_t cols = w_.m_pad - m < kPanel ? w_.m_pad - m : kPanel;
      PrefixProduct(s_.y, w_.e_pad, s_.panels + m * w_.e_pad, kPanel, w_.e_pad, s_.pair,
                    kPairStride, s_.kb + m, w_.m_stride, s_.g + m, w_.m_stride, n, cols);
    }
  }

  // g = da; keeps lse and delta of each row.
  void LogitGradient(const GradPiece& piece, int64_t i) {
    Acc* lse = OfHead(lse_, i, piece.row);
    Acc* delta = OfHead(delta_, i, piece.row);
    Acc* feature_bias = partial_.feature_bias + i * w_.m_pad;
    for (int64_t r = 0; r < piece.rows; ++r) {
      const Acc *f = s_.f + r * w_.m_stride, *cum = s_.cum + r * w_.m_stride;
      Acc* g = s_.g + r * w_.m_stride;
      delta[r] = Dot(f, g, w_.m_pad);
      lse[r] = s_.den[r] == 0 ? kInf<Acc> : s_.shift[r] + Log2(s_.den[r]);
      const Acc scaled = delta[r] * Inverse(s_.den[r]);
      for (int64_t m = 0; m < w_.m_pad; m += kLanes<Acc>) {
        const Vec<Acc> x = Load(f + m) * (Load(g + m) - scaled * Load(cum + m));
        Store(g + m, x);
        Store(feature_bias + m, Load(feature_bias + m) + x);
      }
    }
  }

  // Adds the keys of the piece to the prefix; true if an anchor changed.
  bool UpdatePrefix(const GradPiece& piece) {
    for (int64_t m = 0; m < w_.m_pad; m += kPanel) {
      const int64_t cols = w_.m_pad - m < kPanel ? w_.m_pad - m : kPanel;
      MatMul<true>(PieceValues(piece), 1, w_.e_pad, s_.kb + m, w_.m_stride, piece.rows,
                   s_.panels + m * w_.e_pad, kPanel, w_.e_pad, cols);
    }
    bool renewed = false;
    const Acc* mass = s_.cum + (piece.rows - 1) * w_.m_stride;
    for (int64_t m = 0; m < w_.m; ++m) {
      s_.mass[m] = mass[m];
      if (!(s_.mass[m] > kRenewMass<Acc>)) continue;
      const Acc raised = s_.anchor[m] + Log2(s_.mass[m]);
      ScalePrefix(m, Exp2(s_.anchor[m] - raised));
      s_.anchor[m] = raised;
      renewed = true;
    }
    return renewed;
  }

  // The gradient of the final state as suffix state, relative to the last anchors.
  void StartSuffix() {
    const LoadedState<Acc> grad(params_.grad_state, dims_, slice_.sequence, slice_.head);
    for (int64_t m = 0; m < w_.m; ++m) {
      const Acc inverse = Inverse(s_.mass[m]);
      const Acc* sum = s_.panels + m / kPanel * kPanel * w_.e_pad + m % kPanel;
      Acc r = -grad.log_mass[m] * inverse;
      for (int64_t e = 0; e < w_.e_pad; ++e) {
        const Acc x = e < w_.e && inverse != 0 ? grad.mean[m * w_.e + e] * inverse : Acc(0);
        s_.suffix[m * w_.e_pad + e] = x;
        if (e < w_.e && inverse != 0) r += x * (sum[e * kPanel] * inverse);
      }
      s_.mass[m] = inverse == 0 ? Acc(0) : r;
    }
    for (int64_t m = w_.m; m < w_.m_pad; ++m) s_.mass[m] = 0;
  }

  // Makes the suffix state relative to other, earlier anchors.
  void MoveSuffix(const Acc* anchors) {
    for (int64_t m = 0; m < w_.m; ++m) {
      if (anchors[m] == s_.anchor[m]) continue;
      const Acc keep = Exp2(anchors[m] - s_.anchor[m]);
      for (int64_t e = 0; e < w_.e_pad; ++e) s_.suffix[m * w_.e_pad + e] *= keep;
      s_.mass[m] *= keep;
      s_.anchor[m] = anchors[m];
    }
  }

  void ReverseSweep() {
    ahead_ = Ahead(true);
    StartSuffix();
    for (int64_t p = pieces_.size() - 1; p >= 0; --p) {
      const GradPiece piece = pieces_[p];
      MoveSuffix(&anchors_[piece.anchors * w_.m_pad]);
      ReversePiece(piece);
    }
    MoveSuffix(&anchors_[0]);
    for (int64_t m = 0; m < w_.m; ++m) {
      if (s_.anchor[m] == -kInf<Acc>) continue;  // an empty initial state: gradient 0
      Acc* mean = partial_.mean + m * w_.e_pad;
      Acc sum = -s_.mass[m];
      for (int64_t e = 0; e < w_.e_pad; ++e) {
        mean[e] = s_.suffix[m * w_.e_pad + e];
        sum += mean[e] * s_.initial_mean[m * w_.e_pad + e];
      }
      partial_.log_mass[m] = sum;
    }
  }

  void ReversePiece(const GradPiece& given) {
    const GradPiece piece = {given.row, 0, given.rows,
                             given.anchors};  // here the chunk is the piece
    const int64_t n = piece.rows;
    LoadKeys(piece.row, n);
    WeighKeys(piece);
    TransposeToPanels(s_.suffix, w_.m, w_.e_pad, w_.e_pad, s_.panels);
    for (int64_t m = 0; m < w_.m_pad; ++m) s_.saved[m] = s_.mass[m];
    MatMul<false>(s_.kb, w_.m_stride, 1, s_.suffix, w_.e_pad, w_.m, s_.dv, w_.e_pad, n, w_.e_pad);
    MatMulPanels(s_.keys.v, w_.e_pad, n, s_.panels, w_.e_pad, w_, s_.b,
                 &ahead_);  // g of the keys, in the buffer of the log-features
    for (int64_t i = 0; i < GroupSize(dims_); ++i) ReverseQueries(piece, i);
    KeyLogitGradient(n, w_, s_.keys.skip, s_.saved, s_.kb, s_.b, s_.row_sum);
    ChainSlope(map_, n, w_, s_.key_slope, s_.b);
    MatMul<false>(s_.b, w_.m_stride, 1, key_projection_.rows, w_.d_pad, w_.m, s_.dk, w_.d_pad, n,
                  w_.d_pad);
    StoreKeyGradients(key_rows_, map_, w_, s_.keys, s_.row_sum, piece.row, n, s_.dk, s_.dv);
    MatMul<true>(s_.b, 1, w_.m_stride, s_.keys.k, w_.d_pad, n, partial_.key_projection, w_.d_pad,
                 w_.m, w_.d_pad);
  }

  // The queries of one head: adds to the keys' g and dv, then to the suffix state.
  void ReverseQueries(const GradPiece& piece, int64_t i) {
    const int64_t n = piece.rows;
    const QueryHead<Acc> head = Head(i);
    const Acc *lse = OfHead(lse_, i, piece.row), *delta = OfHead(delta_, i, piece.row);
    LoadQueries(piece, i);
    LogFeatures<Acc>(map_, s_.q, n, head.projection.panels, w_, s_.f, nullptr, &ahead_);
    SetBias(s_.anchor, 1.0, head.feature_bias, w_, s_.bias);
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t m = 0; m < w_.m_pad; m += kLanes<Acc>) {
        Acc* f = s_.f + r * w_.m_stride + m;
        Store(f, Exp2(Load(f) + Load(s_.bias + m) - lse[r]));
      }
      if (lse[r] == kInf<Acc>)
        for (int64_t e = 0; e < w_.e_pad; ++e) s_.y[r * w_.e_pad + e] = 0;
    }
    TransposeRows(s_.y, w_.e_pad, n, w_.e_pad, s_.transposed);
    TransposeRows(s_.f, w_.m_stride, n, w_.m_pad, s_.f_transposed);
    for (int64_t r = 0; r < n; ++r) s_.shift[r] = delta[r];
    for (int64_t r = n; r < C; ++r) s_.shift[r] = 0;
    UpperProduct(s_.keys.v, w_.e_pad, s_.transposed, C, w_.e_pad, n, s_.pair, kPairStride);
    for (int64_t r = 0; r < n; ++r)
      for (int64_t c = 0; c < C; c += kLanes<Acc>) {
        Acc* pair = s_.pair + r * kPairStride + c;
        Store(pair, Load(pair) - Load(s_.shift + c));
      }
    UpperProduct(s_.kb, w_.m_stride, s_.f_transposed, C, w_.m, n, s_.weights, kPairStride);
    AddSuffixProduct(s_.pair, kPairStride, s_.f, w_.m_stride, s_.b, w_.m_stride, n, w_.m_pad);
    AddSuffixProduct(s_.weights, kPairStride, s_.y, w_.e_pad, s_.dv, w_.e_pad, n, w_.e_pad);
    MatMul<true>(s_.f, 1, w_.m_stride, s_.y, w_.e_pad, n, s_.suffix, w_.e_pad, w_.m, w_.e_pad);
    for (int64_t r = 0; r < n; ++r)
      for (int64_t m = 0; m < w_.m_pad; m += kLanes<Acc>)
        Store(s_.mass + m, Load(s_.mass + m) + delta[r] * Load(s_.f + r * w_.m_stride + m));
  }

  // to[cols][C] = from[n][cols]^T, zero in the columns from n on.
  static void TransposeRows(const Acc* from, int64_t stride, int64_t n, int64_t cols, Acc* to) {
    const int64_t whole = n / 4 * 4;
    Transpose(from, stride, whole, cols, to, C);
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t r = whole; r < C; ++r) to[c * C + r] = r < n ? from[r * stride + c] : Acc(0);
  }

  const CausalGradParams& params_;
  const Dims& dims_;
  const Widths w_;
  const Map<Acc> map_;
  const Acc* query_projection_;
  const PackedProjection<Acc> key_projection_;
  const Slice slice_;
  const CausalGradPartial<Acc> partial_;
  const KeyGradientRows<Acc> key_rows_;
  const LoadedState<Acc> initial_;
  Scratch s_;
  Ahead ahead_;
  GrowingArray<GradPiece> pieces_;
  GrowingArray<Acc> anchors_;  // sets of m_pad, a new one only when an anchor changed
  GrowingArray<Acc> rows_;
  Acc *lse_ = nullptr, *delta_ = nullptr;  // [heads of the group][rows] each, base 2 and natural
};

template <class Acc>
bool CausalGrad(const CausalGradParams& params, const Acc* query_projection,
                const Acc* key_projection, Slice slice, Acc* key_bias,
                CausalGradPartial<Acc> partial) {
  return CausalGradient<Acc>(params, query_projection, key_projection, slice, key_bias, partial)
      .Run();
}

PERFORMER_ISA_END
