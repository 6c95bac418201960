// What the gradients with respect to queries and to their projection share: of a tile of kTile rows,
// each warp has 16 rows, and takes the features in blocks of 64. Relative to the anchors, to which
// kb and the state (sum, mass) before the tile are relative too (causal/keys.cuh),
//
//   dG = tril(grad_out v^T)
//   x  = grad_out sum^T + dG kb^T        what each feature gives to grad_out . out
//   z  = mass + tril(1) kb^T             and to what the row's weights sum to
//
// In 16 bits, with narrow rows, the masses before every 16 rows are summed once, and the product
// with tril(1) is that of the 16 rows alone. Where means are stored each second tile, the block of
// another tile computes kb of the tile before too, and adds its values to the state (Advance).
//
// As in the forward pass nothing of a later row changes a bit of an earlier one. But here keys are
// summed over behind the causal mask, where 0 NaN would reach earlier rows: so a key that is NaN
// begins a sub-chunk, and x and z of rows outside of the sub-chunk are set to 0.
#pragma once
#include "cuda/kernels/causal/keys.cuh"
#include "cuda/kernels/causal_backward/common.cuh"

namespace performer {
namespace cuda {

template <class T>
struct CausalTileGradientParams : CausalTileParams<T> {
  RowsOf<const T> grad_out;       // [B L, H, E]
  const float* origin = nullptr;  // see CausalGradientParams
};

template <class T>
struct CausalTileGradientPointers : CausalPointers<T> {
  const T* grad_out;    // [rows, H, E]
  const float* origin;  // [W], or nullptr in 16 bits
  const float*
      mean_log_mass;  // [M_pad]: of the checkpoint that has the mean; nullptr if it is empty
  int64_t line;       // of row 0 in [B L, H]
  bool advances;      // the checkpoint is that before the tile before
};

// By one thread. `number`: of the tile.
template <class T, int W>
PERFORMER_DEVICE CausalTileGradientPointers<T> MakeCausalTileGradientPointers(
    const CausalTileGradientParams<T>& p, const WorkTile& work, int64_t number,
    const RowsOf<T>& result) {
  const int64_t head = blockIdx.y, heads = p.query.heads, group = head / (heads / p.groups);
  const int64_t row = work.first_row + work.begin, split_rows = WorkTileRows(p.splits, work.rows);
  const int64_t split = FirstWorkTile(p.splits, work.sequence) + work.begin / split_rows;
  const bool advances = work.begin % split_rows / kTile % kCheckpointTiles<T, W> != 0;
  const CausalPointers<T> pointers = MakeCausalPointers<T, W>(p, work, number, result);
  return {pointers,
          p.grad_out.Row(row, head),
          OriginOfTile<T, W>(p.origin, split, p.groups, group, work.begin % split_rows > 0),
          pointers.mean == nullptr ? nullptr
                                   : pointers.log_mass - (advances ? p.groups * p.features_pad : 0),
          row * heads + head,
          advances};
}

// What the layouts of these kernels have in common.
template <class T, int W>
struct CausalTileGradientLayout {
  using R = Ranged<T>;
  using Weight = R;
  static constexpr bool kCutsNan = true;
  static constexpr bool kHasOrigin = !kIs16Bit<T>;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kFeatures = 16 * kWarps;  // of a feature block: 16 of each warp
  static_assert(kTile == 16 * kWarps && kFeatures == kFeatureUnit, "a warp has 16 queries");
  static constexpr float kMaxGrowth = kCausalCutNats;
  static constexpr bool kAdvances = kCheckpointTiles<T, W> > 1;
  // mass of the state before every 16 rows, where registers allow; with one, of that before the
  // tile.
  static constexpr int kMassRows = kIs16Bit<T> && W == 64 ? kTile / 16 : 1;
  // Whether the queries of a warp and their grad_out take turns in the same memory.
  static constexpr bool kSharesRows = W * sizeof(T) > 256;

  static constexpr int kSize = static_cast<int>(sizeof(T));
  static constexpr int kTileBytes = kTile * W * kSize, kFeatureBytes = kFeatures * W * kSize;
  static constexpr int kQuery = 0;  // [kTile][W]
  static constexpr int kGradOut = kSharesRows ? kQuery : kTileBytes;
  static constexpr int kKey = kGradOut + kTileBytes;
  // With kAdvances: keys and values of the tile before, [kTile][W]
  static constexpr int kKeyBefore = kKey + kTileBytes;
  static constexpr int kValueBefore = kKeyBefore + kTileBytes;
  static constexpr int kProjection = kAdvances ? kValueBefore + kTileBytes : kKeyBefore;
};

// The members are the same for all threads of a block.
template <class T, int W, class Layout, class Params, class Pointers>
struct CausalTileGradientBlock : CausalKeys<T, W, Layout> {
  using Base = CausalKeys<T, W, Layout>;
  using L = Layout;
  using R = typename L::R;
  using Base::kKeyTiles, Base::kColumns;
  using Base::shared, Base::tile, Base::floats;
  using typename Base::Anchors, typename Base::KeyLogits;
  // Features whose products are in registers at a time.
  static constexpr int kStep = kIs16Bit<T> && W == 64 ? 32 : 16;
  using Step = float[kStep / 8][4];

  const Params& p;

  PERFORMER_DEVICE CausalTileGradientBlock(const Params& params, unsigned char* memory)
      : Base{params, memory}, p(params) {}

  PERFORMER_DEVICE R* ranged(int offset) const { return reinterpret_cast<R*>(shared + offset); }
  PERFORMER_DEVICE Pointers* pointers() const {
    return reinterpret_cast<Pointers*>(shared + L::kPointers);
  }

  // dG of the warp's rows as A operands of 16 keys each.
  using Pairs = uint32_t[kTile / 16][kFragment<R>];

  // Whether a thread's row 8 (i / 2) further lies outside of the sub-chunk [begin, end).
  PERFORMER_DEVICE static bool IsHidden(int i, int row0, int begin, int end, int lane) {
    const int row = row0 + lane / 4 + 8 * (i / 2);
    return row < begin || row >= end;
  }

  // The masks of the tile's keys, and of those of the tile before, to shared memory.
  template <class Stream>
  PERFORMER_DEVICE void LoadMasks(Stream& stream, int tid) const {
    stream.LoadKeyBias(0, tid);
    stream.StoreKeyBias(0, tid);
    if constexpr (L::kAdvances)
      if (pointers()->advances) {
        stream.LoadKeyBias(-1, tid);
        stream.StoreKeyBias(1, tid);
      }
  }
  // Starts copying the keys and values of both.
  template <class Stream>
  PERFORMER_DEVICE void IssueKeys(const Stream& stream, int tid) const {
    if constexpr (L::kAdvances)
      if (pointers()->advances) {
        stream.Copy(p.keys.key, stream.pointers->key, -1, 1, tile(L::kKeyBefore), tid);
        stream.Copy(p.keys.value, stream.pointers->value, -1, 1, tile(L::kValueBefore), tid);
      }
    stream.Issue(0, 0, tile(L::kKey), tile(L::kValue), tid);
  }
  // Once what this thread copied is there.
  template <class Stream>
  PERFORMER_DEVICE void FinishKeys(const Stream& stream, int tid) const {
    stream.ComputeBias(0, tile(L::kKey), tid);
    if constexpr (L::kHasOrigin)
      SubtractOrigin<T, W, kTile, L::kThreads>(tile(L::kValue), pointers()->origin, tid);
    if constexpr (L::kAdvances)
      if (pointers()->advances) {
        stream.ComputeBias(1, tile(L::kKeyBefore), tid);
        MakeRanged<T, W, kTile, L::kThreads>(ranged(L::kValueBefore), tile(L::kValueBefore), tid);
      }
  }

  // Starts copying grad_out and, unless they take turns, the queries of the tile.
  PERFORMER_DEVICE void IssueRows(int rows, int tid) const {
    const auto valid = [&](int r) { return r < rows; };
    CopyRows<T, W, kTile, L::kThreads>(tile(L::kGradOut), pointers()->grad_out, 0, p.grad_out, tid,
                                       valid);
    if constexpr (!L::kSharesRows)
      CopyRows<T, W, kTile, L::kThreads>(tile(L::kQuery), pointers()->query, 0, p.query, tid,
                                         valid);
  }

  // Starts copying the state before the tile, of the features from `first` on.
  PERFORMER_DEVICE void IssueState(T* state, int first, int tid) const {
    if (pointers()->mean != nullptr)
      CopyOperand<T, W, L::kFeatures, L::kThreads>(
          state, pointers()->mean + static_cast<int64_t>(first) * W, tid);
    else
      for (int i = tid; i < L::kFeatureBytes / 16; i += L::kThreads)
        reinterpret_cast<uint4*>(state)[i] = uint4{0, 0, 0, 0};
  }

  // With kSharesRows: brings the warp's queries, or their grad_out, to the memory that they share.
  PERFORMER_DEVICE void TakeQueries(int row0, int rows, int lane) const {
    if constexpr (L::kSharesRows) {
      TakeTurns(pointers()->query, p.query, row0, rows, lane);
      __syncwarp();  // the rows are complete
    }
  }
  PERFORMER_DEVICE void TakeGradOut(int row0, int rows, int lane) const {
    if constexpr (L::kSharesRows) {
      TakeTurns(pointers()->grad_out, p.grad_out, row0, rows, lane);
      MakeRanged<T, W, 16, 32>(ranged(L::kGradOut) + row0 * W, tile(L::kGradOut) + row0 * W, lane);
      __syncwarp();  // the rows are complete
    }
  }

  // In half grad_out and values become operands in bfloat16, as on the side of keys: only then do
  // the pairs that it computes cancel against delta. Each thread converts what it copied.
  PERFORMER_DEVICE void MakeRowsRanged(int tid) const {
    MakeRanged<T, W, kTile, L::kThreads>(ranged(L::kGradOut), tile(L::kGradOut), tid);
    MakeRanged<T, W, kTile, L::kThreads>(ranged(L::kValue), tile(L::kValue), tid);
  }

  // grad_out and values are those of the tile, in shared memory.
  PERFORMER_DEVICE void PairGradients(Pairs& pairs, int row0, int lane) const {
    const int g = lane / 4, t = lane % 4;
    float x[kKeyTiles][4] = {};
#pragma unroll(kUnroll<R>)
    for (int s = 0; s < W / 16; ++s) {
      uint32_t a[kFragment<R>];
      LoadA<R, W>(a, ranged(L::kGradOut), row0, s * 16, lane);
#pragma unroll
      for (int n = 0; n < kKeyTiles / 2; ++n) {
        if (n * 16 > row0) continue;  // above the triangle
        uint32_t b[kFragment<R>];
        LoadB<R, W>(b, ranged(L::kValue), n * 16, s * 16, lane);
        Mma<R>(x[2 * n], x[2 * n + 1], a, b);
      }
    }
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[n][i] = n * 8 + 2 * t + (i & 1) <= row0 + g + 8 * (i / 2) ? x[n][i] : 0.f;
#pragma unroll
    for (int s = 0; s < kTile / 16; ++s) PackA<R>(pairs[s], x[2 * s], x[2 * s + 1]);
  }

  // The keys of the sub-chunk that begins at `begin`: kb, the state and anchors to shared memory,
  // where the next barrier makes them visible. bias: of the keys, then of those of the tile before.
  PERFORMER_DEVICE void Keys(Anchors& anchors, T* state, const typename Base::Features& own,
                             const float* bias, int begin, int first, int warp, int lane) const {
    KeyLogits x;
    float2 shares[2];
    Base::Logits(x, own, bias, tile(L::kKey), first + warp * 16, Opaque(lane));
    if (begin == 0)
      Base::FirstAnchors(anchors, shares, own, x, lane);
    else
      Base::NextAnchors(anchors, shares, x, begin, lane);
    const int cut = Base::Cut(x, anchors, begin, lane);
    if (lane == 0) reinterpret_cast<int*>(shared + L::kCuts)[warp] = cut;
    Base::StoreWeights(x, anchors, own, cut, warp, Opaque(lane));
    if constexpr (L::kMassRows > 1) StoreMasses(anchors, warp, Opaque(lane));
    if constexpr (L::kAdvances)
      if (begin == 0 && pointers()->advances) {
        Advance(state, anchors, shares, own, bias + kTile, first + warp * 16, warp, Opaque(lane));
        return;
      }
    Base::ScaleState(state, shares, begin == 0, first, warp, Opaque(lane),
                     L::kHasOrigin && begin == 0 ? pointers()->origin : nullptr);
  }
  // The masses before every 16 rows but the first: with the tile's own keys before these, as their
  // kb is rounded.
  PERFORMER_DEVICE void StoreMasses(const Anchors& anchors, int warp, int lane) const {
    __syncwarp();  // kb of the warp's features is visible
    const uint32_t ones = Pack<R>(1.f, 1.f);
    float sum[4] = {anchors.mass[0], anchors.mass[0], anchors.mass[1], anchors.mass[1]};
#pragma unroll
    for (int s = 0; s < L::kMassRows - 1; ++s) {
      uint32_t a[kFragment<R>];
      LoadA<R, kTile>(a, ranged(L::kWeights), warp * 16, s * 16, lane);
      MmaM16N8K16<R>(sum, a, ones, ones);
      float* const to = floats(L::kMass) + (s + 1) * L::kFeatures + warp * 16 + lane / 4;
      if (lane % 4 == 0) to[0] = sum[0], to[8] = sum[2];
    }
  }

  // The warp's 16 rows of the state, which are those of the checkpoint, become the state before the
  // tile: with that before the split, and the keys of the tile before. shares: of FirstAnchors.
  PERFORMER_DEVICE void Advance(T* state, const Anchors& anchors, const float2 (&shares)[2],
                                const typename Base::Features& own, const float* bias, int feature,
                                int warp, int lane) const {
    const int g = lane / 4, t = lane % 4;
    const float unit = p.map.unit();
    KeyLogits x;
    Base::Logits(x, own, bias, tile(L::kKeyBefore), feature, lane);
    float sum[kColumns][4] = {};
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[n][i] = Exp2((x[n][i] - ZeroIfNone(anchors.anchor[i / 2])) * unit);
#pragma unroll
    for (int s = 0; s < kTile / 16; ++s) {
      uint32_t a[kFragment<R>];
      PackA<R>(a, x[2 * s], x[2 * s + 1]);
#pragma unroll
      for (int n = 0; n < kColumns / 2; ++n) {
        uint32_t b[kFragment<R>];
        LoadBTrans<R, W>(b, ranged(L::kValueBefore), s * 16, n * 16, lane);
        Mma<R>(sum[2 * n], sum[2 * n + 1], a, b);
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float log_mass = pointers()->mean_log_mass == nullptr
                                 ? -kInfinity
                                 : pointers()->mean_log_mass[feature + g + 8 * e];
      const float share = Exp2((log_mass - ZeroIfNone(anchors.anchor[e])) * unit);
      const T* const before = pointers()->before_mean;
      const int64_t row = static_cast<int64_t>(feature + g + 8 * e) * W + 2 * t;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        float2 y = {sum[n][2 * e], sum[n][2 * e + 1]};
        if (before != nullptr) {
          const float2 other = LoadPair(before + row + n * 8);
          y.x += shares[e].x * other.x, y.y += shares[e].x * other.y;
        }
        T* const at = state + AtPair<T, W>(warp * 16 + g, n, t) + 8 * e * W;
        const float2 mean = LoadPair(at);
        StorePair(reinterpret_cast<R*>(at), y.x + share * mean.x, y.y + share * mean.y);
      }
    }
  }

  // Walks the sub-chunks of a tile of `rows` for the features from `first` on: visit(begin, end)
  // sees their kb, state and anchors. `own` is read before the last of these calls.
  template <class Visit>
  PERFORMER_DEVICE void WalkSubChunks(T* state, const typename Base::Features& own,
                                      const float* bias, int rows, int first, int warp, int lane,
                                      Visit visit) const {
    Anchors anchors;
    int end;
#pragma unroll 1
    for (int begin = 0; begin < rows; begin = end) {
      Keys(anchors, state, own, bias, begin, first, warp, lane);
      __syncthreads();  // kb, the state, anchors and cuts are visible
      const int* const cuts = reinterpret_cast<const int*>(shared + L::kCuts);
      end = min(min(cuts[0], cuts[1]), min(cuts[2], cuts[3]));
      visit(begin, end);
      if (end < rows) __syncthreads();  // kb and the state may be overwritten
    }
  }

  // y += the warp's rows of `tokens` x the rows of `columns`.
  template <class N>
  PERFORMER_DEVICE static void Product(Step& y, const N* tokens, const N* columns, int row0,
                                       int lane) {
#pragma unroll(kUnroll<N>)
    for (int s = 0; s < W / 16; ++s) {
      uint32_t a[kFragment<N>];
      LoadA<N, W>(a, tokens, row0, s * 16, lane);
#pragma unroll
      for (int n = 0; n < kStep / 16; ++n) {
        uint32_t b[kFragment<N>];
        LoadB<N, W>(b, columns, n * 16, s * 16, lane);
        Mma<N>(y[2 * n], y[2 * n + 1], a, b);
      }
    }
  }

  // y = log-features of the queries, plus `anchor`, which holds the feature bias too.
  PERFORMER_DEVICE void QueryProduct(Step& y, const T* projection, const float* anchor, int row0,
                                     int lane) const {
    const int t = lane % 4;
    const bool linear = p.map.linear();
    if (linear)
      SetRows(y, anchor + 2 * t);
    else
      SetZero(y);
    Product(y, tile(L::kQuery), projection, row0, lane);
    if (!linear) MapLogits(y, p.map, anchor, t);
  }

  // x and z of the features `first` .. of the block.
  PERFORMER_DEVICE void Gains(Step& x, Step& z, const Pairs& pairs, const R* state, int first,
                              int row0, int lane) const {
    const R* const weights = ranged(L::kWeights) + first * kTile;
    SetZero(x);
    Product(x, ranged(L::kGradOut), state, row0, lane);
#pragma unroll
    for (int s = 0; s < kTile / 16; ++s) {
      if (s * 16 > row0) continue;  // above the triangle
#pragma unroll
      for (int n = 0; n < kStep / 16; ++n) {
        uint32_t b[kFragment<R>];
        LoadB<R, kTile>(b, weights, n * 16, s * 16, lane);
        Mma<R>(x[2 * n], x[2 * n + 1], pairs[s], b);
      }
    }
    lane = Opaque(lane);
    constexpr bool kMasses = L::kMassRows > 1;
    const float* const mass = floats(L::kMass) + (kMasses ? row0 / 16 * L::kFeatures : 0) + first;
    SetRows(z, mass + 2 * (lane % 4));
#pragma unroll 1
    for (int s = kMasses ? row0 / 16 : 0; s <= row0 / 16; ++s) {
      uint32_t ones[kFragment<R>];
      LowerOnes(ones, s * 16 < row0, lane);
#pragma unroll
      for (int n = 0; n < kStep / 16; ++n) {
        uint32_t b[kFragment<R>];
        LoadB<R, kTile>(b, weights, n * 16, s * 16, lane);
        Mma<R>(z[2 * n], z[2 * n + 1], ones, b);
      }
    }
  }
  // 16 rows and columns of the lower triangle of ones: below its diagonal (all ones), or on it.
  PERFORMER_DEVICE static void LowerOnes(uint32_t (&ones)[kFragment<R>], bool below, int lane) {
    const int g = lane / 4, t = lane % 4;
    const float even = below || 2 * t <= g ? 1.f : 0.f, odd = below || 2 * t < g ? 1.f : 0.f;
    const float above = below ? 1.f : 0.f;
    PackA<R>(ones, {even, odd, 1.f, 1.f}, {above, above, even, odd});
  }

  // Of maps that are not linear: the slopes at the queries' products, which are computed once more,
  // as registers are short.
  PERFORMER_DEVICE void Slopes(Step& y, const T* projection, int row0, int lane) const {
    SetZero(y);
    Product(y, tile(L::kQuery), projection, row0, lane);
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) y[n][i] = MapSlope(p.map, y[n][i]);
  }

 private:
  // Copies rows of the warp, which are complete in the lane that copied them.
  PERFORMER_DEVICE void TakeTurns(const T* from, const RowsOf<const T>& shape, int row0, int rows,
                                  int lane) const {
    __syncwarp();  // nobody reads the others any more
    CopyRows<T, W, 16, 32>(tile(L::kQuery) + row0 * W, from, row0, shape, lane,
                           [&](int r) { return row0 + r < rows; });
    CpAsyncCommit();
    CpAsyncWait<0>();
  }
};

}  // namespace cuda
}  // namespace performer
