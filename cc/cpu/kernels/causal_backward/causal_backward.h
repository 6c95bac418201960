// Gradient of causal attention in two sweeps over the sub-chunks of causal.h; per row and head one
// normaliser is kept, never L x M.
//
// Forward scan, with the prefix state (sum, mass) before the sub-chunk and cum[i] = mass + sum_{j <=
// i} kb[j]:
//   f = 2^(a + anchor - shift)   den = sum_m f cum   y = dout / den   P = tril(y v^T)
//   g = y sum^T + P kb           delta = sum_m f g   da = f (g - delta / den cum)
//   dq = da w                    dw += da^T q        lse = shift + log2 den, kept with delta
// Reverse scan, with the reverse state R = sum over later rows of f dout, r = the same of f delta,
// relative to the anchors, which never fall along the sequence: going back, every factor 2^(anchor
// - later anchor) is <= 1. f = 2^(a + anchor - lse) is normalised here.
//   db = kb (v R^T - r + triu(v dout^T - delta) f)      dv = kb R + triu(kb f^T) dout
//   dk = db w - scale k sum_m db    dw += db^T k        then R += f^T dout, r += f^T delta
// The final state's gradient is the first reverse state; the initial state is a key that every row
// sees.
#pragma once
#include "cpu/kernels/bidirectional_backward.h"
#include "cpu/kernels/causal.h"

PERFORMER_ISA_BEGIN

template <class Acc>
struct CausalGradScratch {
  static constexpr int64_t C = kCausalGradChunk, kPairStride = C + kPad<Acc>;
  static_assert(C % kPad<Acc> == 0);
  KeyChunk<Acc> keys;
  // Keys of the sub-chunk: log-features, weights, running sums of weights, slopes.
  Acc *b, *kb, *cum, *key_slope;  // [C][m_stride]
  // Queries of the piece.
  Acc *q, *y, *f, *g, *query_slope, *dq, *dk, *dv;
  Acc *transposed, *f_transposed;  // [e_pad][C], [m_pad][C]
  Acc *pair, *weights;             // [C][kPairStride]
  Acc *tops, *shift, *den, *row_sum, *bias;
  // Prefix sums^T in the forward scan [m_panels][e_pad][kPanel]; in the reverse scan R^T, as
  // panels of `reverse state`.
  Acc *panels, *reverse_state;  // reverse state: R [m][e_pad]
  Acc *mass, *anchor, *saved,
      *initial_mean;  // mass: r in the reverse scan; saved: r before the sub-chunk

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
    for (Acc** state : {&reverse_state, &initial_mean}) *state = arena.Take<Acc>(w.m * w.e_pad);
    for (Acc** row : {&bias, &mass, &anchor, &saved}) *row = arena.Take<Acc>(w.m_pad);
  }
};

// A sub-chunk of the forward scan, and the set of anchors it used.
struct GradSubChunk {
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
    if (!ForwardScan()) return false;
    ReverseScan();
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
    return {params_, params_.queries, query_projection_, w_, FirstHead() + i};
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
  // kb and cum for the rows of the sub-chunk, which then begin at row 0 of these buffers.
  void WeighKeys(const GradSubChunk& sub_chunk) {
    const int64_t first = sub_chunk.chunk_begin * w_.m_stride;
    for (int64_t m = 0; m < w_.m_pad; m += kLanes<Acc>) {
      const Vec<Acc> given = Load(s_.anchor + m), zero = {};
      const Vec<Acc> anchor = given == -kInf<Acc> ? zero : given;
      Vec<Acc> sum = Load(s_.mass + m);
      for (int64_t j = 0; j < sub_chunk.rows; ++j) {
        const Vec<Acc> x = Exp2(Load(s_.b + first + j * w_.m_stride + m) - anchor);
        sum += x;
        Store(s_.kb + j * w_.m_stride + m, x);
        Store(s_.cum + j * w_.m_stride + m, sum);
      }
    }
  }

  const Acc* SubChunkValues(const GradSubChunk& sub_chunk) const {
    return s_.keys.v + sub_chunk.chunk_begin * w_.e_pad;
  }

  void LoadQueries(const GradSubChunk& sub_chunk, int64_t i) {
    const int64_t head = FirstHead() + i;
    LoadRows<Acc>({params_.queries.query, params_.dtype, dims_.heads, head, w_.d}, sub_chunk.row,
                  sub_chunk.rows, nullptr, s_.q, w_.d_pad, &ahead_);
    LoadRows<Acc>({params_.grad_out, params_.dtype, dims_.heads, head, w_.e}, sub_chunk.row,
                  sub_chunk.rows, nullptr, s_.y, w_.e_pad, &ahead_);
  }

  // to[cols][C] = from[n][cols]^T, zero in the columns from n on.
  static void TransposeRows(const Acc* from, int64_t stride, int64_t n, int64_t cols, Acc* to) {
    const int64_t whole = n / 4 * 4;
    Transpose(from, stride, whole, cols, to, C);
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t r = whole; r < C; ++r) to[c * C + r] = r < n ? from[r * stride + c] : Acc(0);
  }

  // forward_scan.h
  void ScalePrefix(int64_t m, Acc keep);
  bool SaveAnchors();
  int64_t AnchorSets() const;
  void StartPrefix();
  bool ForwardScan();
  void ZeroRows(int64_t row);
  void RaisePrefix(const Acc* b);
  void ForwardQueries(const GradSubChunk& sub_chunk, int64_t i);
  void PrefixProducts(const GradSubChunk& sub_chunk);
  void LogitGradient(const GradSubChunk& sub_chunk, int64_t i);
  bool UpdatePrefix(const GradSubChunk& sub_chunk);

  // reverse_scan.h
  void StartReverseState();
  void MoveReverseState(const Acc* anchors);
  void ReverseScan();
  void ReverseSubChunk(const GradSubChunk& given);
  void ReverseQueries(const GradSubChunk& sub_chunk, int64_t i);

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
  GrowingArray<GradSubChunk> sub_chunks_;
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

#include "cpu/kernels/causal_backward/forward_scan.h"
#include "cpu/kernels/causal_backward/reverse_scan.h"
