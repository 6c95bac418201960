// Gradient of causal attention in two sweeps over the sub-chunks of causal.h; per row and head one
// normaliser is kept, never L x M.
//
// Forward scan, with the prefix state (sum, mass) before the sub-chunk and cum[i] = mass + sum_{j <=
// i} key_features[j]:
//   f = 2^(a + anchor - shift)   den = sum_m f cum   y = dout / den   P = tril(y v^T)
//   g = y sum^T + P key_features           delta = sum_m f g   da = f (g - delta / den cum)
//   dq = da w                    dw += da^T q        lse = shift + log2 den, kept with delta
// Reverse scan, with the reverse state R = sum over later rows of f dout, r = the same of f delta,
// relative to the anchors, which never fall along the sequence: going back, every factor 2^(anchor
// - later anchor) is <= 1. f = 2^(a + anchor - lse) is normalised here.
//   db = key_features (v R^T - r + triu(v dout^T - delta) f)      dv = key_features R + triu(key_features f^T) dout
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
  Acc *b, *key_features, *cum, *key_slope;  // [C][m_stride]
  // Queries of the piece.
  Acc *q, *y, *f, *g, *query_slope, *dq, *dk, *dv;
  Acc *transposed, *f_transposed;  // [e_pad][C], [m_pad][C]
  Acc *pair, *weights;             // [C][kPairStride]
  Acc *row_max, *shift, *den, *row_sum, *bias;
  // Prefix sums^T in the forward scan [m_panels][e_pad][kPanel]; in the reverse scan R^T, as
  // panels of `reverse state`.
  Acc *panels, *reverse_state;  // reverse state: R [m][e_pad]
  Acc *mass, *anchor, *saved,
      *initial_mean;  // mass: r in the reverse scan; saved: r before the sub-chunk

  void Place(Arena& arena, const Map<Acc>& map, const Strides& strides) {
    keys.Place(arena, strides, C);
    for (Acc** rows : {&b, &key_features, &cum, &f, &g})
      *rows = arena.Take<Acc>(C * strides.m_stride);
    for (Acc** rows : {&key_slope, &query_slope})
      *rows = map.linear() ? nullptr : arena.Take<Acc>(C * strides.m_stride);
    for (Acc** rows : {&q, &dq, &dk}) *rows = arena.Take<Acc>(C * strides.d_pad);
    for (Acc** rows : {&y, &dv}) *rows = arena.Take<Acc>(C * strides.e_pad);
    transposed = arena.Take<Acc>(strides.e_pad * C);
    f_transposed = arena.Take<Acc>(strides.m_pad * C);
    for (Acc** pairs : {&pair, &weights}) *pairs = arena.Take<Acc>(C * kPairStride);
    row_max = arena.Take<Acc>(C * kLanes<Acc>);
    for (Acc** column : {&shift, &den, &row_sum}) *column = arena.Take<Acc>(C);
    panels = arena.Take<Acc>(strides.m_panels * kPanel * strides.e_pad);
    for (Acc** state : {&reverse_state, &initial_mean})
      *state = arena.Take<Acc>(strides.m * strides.e_pad);
    for (Acc** row : {&bias, &mass, &anchor, &saved}) *row = arena.Take<Acc>(strides.m_pad);
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
                 const Acc* key_projection, WorkRange range, Acc* key_bias,
                 CausalGradPartial<Acc> partial)
      : params_(params),
        dims_(params.dims),
        strides_(MakeStrides<Acc>(params.dims)),
        map_(params),
        query_projection_(query_projection),
        key_projection_(PackedProjection<Acc>::At(
            key_projection + (params.keys.projection_heads == 1 ? 0 : range.head) *
                                 PackedProjection<Acc>::Size(strides_),
            strides_)),
        range_(range),
        partial_(partial),
        key_rows_(params, params.grad_keys, range, key_bias),
        initial_(params.initial, params.dims, range.sequence, range.head) {}

  bool Run() {
    Arena arena;
    s_.Place(arena, map_, strides_);
    if (!arena.Allocate()) return false;
    s_.Place(arena, map_, strides_);
    const int64_t rows = range_.end - range_.begin;
    lse_ = rows_.Append(2 * rows * GroupSize(dims_));
    if (lse_ == nullptr && rows > 0) return false;
    delta_ = lse_ + rows * GroupSize(dims_);
    for (int64_t i = 0; i < CausalGradPartial<Acc>::Size(strides_, GroupSize(dims_)); ++i)
      partial_.log_mass[i] = 0;
    if (!ForwardScan()) return false;
    ReverseScan();
    return true;
  }

 private:
  using Scratch = CausalGradScratch<Acc>;
  static constexpr int64_t C = Scratch::C, kPairStride = Scratch::kPairStride;

  int64_t FirstHead() const { return range_.head * GroupSize(dims_); }
  Acc* OfHead(Acc* rows, int64_t i, int64_t row) const {
    return rows + i * (range_.end - range_.begin) + row - range_.begin;
  }
  QueryHead<Acc> Head(int64_t i) const {
    return {params_, params_.queries, query_projection_, strides_, FirstHead() + i};
  }

  // Log-features of the keys of a chunk, with offsets.
  void LoadKeys(int64_t row, int64_t n) {
    s_.keys.Load(params_, params_.keys, map_, strides_, range_, row, n, &prefetcher_);
    LogFeatures(map_, s_.keys.k, n, key_projection_.panels, strides_, s_.b, s_.key_slope,
                &prefetcher_);
    for (int64_t j = 0; j < n; ++j)
      for (int64_t m = j * strides_.m_stride; m < j * strides_.m_stride + strides_.m_pad;
           m += kLanes<Acc>)
        Store(s_.b + m, Load(s_.b + m) + s_.keys.offset[j]);
  }

  bool Exceeds(int64_t j) const {
    IntVec<Acc> any = {};
    for (int64_t m = 0; m < strides_.m_pad; m += kLanes<Acc>)
      any |= Load(s_.b + j * strides_.m_stride + m) > Load(s_.anchor + m) + kCutBits<Acc>;
    for (int l = 0; l < kLanes<Acc>; ++l)
      if (any[l]) return true;
    return false;
  }
  bool Empty() const {
    for (int64_t m = 0; m < strides_.m; ++m)
      if (s_.anchor[m] != -kInf<Acc>) return false;
    return true;
  }
  // key_features and cum for the rows of the sub-chunk, which then begin at row 0 of these buffers.
  void ApplyFeatureMap(const GradSubChunk& sub_chunk) {
    const int64_t first = sub_chunk.chunk_begin * strides_.m_stride;
    for (int64_t m = 0; m < strides_.m_pad; m += kLanes<Acc>) {
      const Vec<Acc> given = Load(s_.anchor + m), zero = {};
      const Vec<Acc> anchor = given == -kInf<Acc> ? zero : given;
      Vec<Acc> sum = Load(s_.mass + m);
      for (int64_t j = 0; j < sub_chunk.rows; ++j) {
        const Vec<Acc> x = Exp2(Load(s_.b + first + j * strides_.m_stride + m) - anchor);
        sum += x;
        Store(s_.key_features + j * strides_.m_stride + m, x);
        Store(s_.cum + j * strides_.m_stride + m, sum);
      }
    }
  }

  const Acc* SubChunkValues(const GradSubChunk& sub_chunk) const {
    return s_.keys.v + sub_chunk.chunk_begin * strides_.e_pad;
  }

  void LoadQueries(const GradSubChunk& sub_chunk, int64_t i) {
    const int64_t head = FirstHead() + i;
    LoadRows<Acc>({params_.queries.query, params_.dtype, dims_.heads, head, strides_.d},
                  sub_chunk.row, sub_chunk.rows, nullptr, s_.q, strides_.d_pad, &prefetcher_);
    LoadRows<Acc>({params_.grad_out, params_.dtype, dims_.heads, head, strides_.e}, sub_chunk.row,
                  sub_chunk.rows, nullptr, s_.y, strides_.e_pad, &prefetcher_);
  }

  // to[cols][C] = from[n][cols]^T, zero in the columns from n on.
  static void TransposeRows(const Acc* from, int64_t stride, int64_t n, int64_t cols, Acc* to) {
    const int64_t whole = n / 4 * 4;
    Transpose(from, stride, whole, cols, to, C);
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t r = whole; r < C; ++r) to[c * C + r] = r < n ? from[r * stride + c] : Acc(0);
  }

  // forward_scan.h
  void ScaleForwardState(int64_t m, Acc keep);
  bool SaveAnchors();
  int64_t AnchorSets() const;
  void StartForwardState();
  bool ForwardScan();
  void ZeroRows(int64_t row);
  void RaiseForwardState(const Acc* b);
  void ForwardQueries(const GradSubChunk& sub_chunk, int64_t i);
  void FeatureGradient(const GradSubChunk& sub_chunk);
  void LogitGradient(const GradSubChunk& sub_chunk, int64_t i);
  bool UpdateForwardState(const GradSubChunk& sub_chunk);

  // reverse_scan.h
  void StartReverseState();
  void RescaleReverseState(const Acc* anchors);
  void ReverseScan();
  void ReverseSubChunk(const GradSubChunk& given);
  void ReverseQueries(const GradSubChunk& sub_chunk, int64_t i);

  const CausalGradParams& params_;
  const Dims& dims_;
  const Strides strides_;
  const Map<Acc> map_;
  const Acc* query_projection_;
  const PackedProjection<Acc> key_projection_;
  const WorkRange range_;
  const CausalGradPartial<Acc> partial_;
  const KeyGradientRows<Acc> key_rows_;
  const LoadedState<Acc> initial_;
  Scratch s_;
  Prefetcher prefetcher_;
  GrowingArray<GradSubChunk> sub_chunks_;
  GrowingArray<Acc> anchors_;  // sets of m_pad, a new one only when an anchor changed
  GrowingArray<Acc> rows_;
  Acc *lse_ = nullptr, *delta_ = nullptr;  // [heads of the group][rows] each, base 2 and natural
};

template <class Acc>
bool CausalGrad(const CausalGradParams& params, const Acc* query_projection,
                const Acc* key_projection, WorkRange range, Acc* key_bias,
                CausalGradPartial<Acc> partial) {
  return CausalGradient<Acc>(params, query_projection, key_projection, range, key_bias, partial)
      .Run();
}

PERFORMER_ISA_END

#include "cpu/kernels/causal_backward/forward_scan.h"
#include "cpu/kernels/causal_backward/reverse_scan.h"
