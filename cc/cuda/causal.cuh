// Causal attention: out[i] = sum_{j <= i} A[i, j] v[j] / sum_{j <= i} A[i, j], in chunks with a
// running state.
//
// Grid: (segments of all sequences, query heads, groups of landmarks). A block walks the chunks of
// its segment from the state before it, which it keeps in registers; a warp owns 16 kGroups
// landmarks of the state and, with one partner, 16 query rows of the chunk. For each chunk:
//   keys     b = w k^T  ->  anchor, kb = exp(b - anchor)  ->  shared memory; state += kb v
//   queries  f = exp(w q + anchor - top)  ->  local = f kb and num = f state_before, each partner
//            over half of the landmarks
//   output   the partners' sums meet in shared memory; out = (num + tril(local) v) / den
// The state is (anchor, mass, sum): log_mass = anchor + log(mass), mean = sum / mass.
//
// Nothing of a later row may change a bit of an earlier one, whatever it holds:
// - A chunk is processed in pieces, nearly always one. A landmark's anchor for a piece is the
//   largest of its log_mass before and b of the piece's first key (if that is not masked). A
//   landmark with neither has none: it weighs nothing in this piece.
// - A piece ends before a key that exceeds an anchor by more than kMaxGrowth, or that gives
//   something to a landmark without anchor. Rows before the cut do the same arithmetic either way.
// - Rows of v meet in a product, and 0 * inf is NaN: a value that is not finite is taken out of the
//   tile and remembered as poison[e], the first row from which column e is NaN. (A cut before it
//   would not do: later rows stay in the tile.)
// - Features need no such care: no product sums over keys before the causal mask, which selects and
//   does not multiply.
#pragma once
#include "cuda/causal_layout.cuh"

namespace performer {
namespace cuda {

// What one block does; members are the parts that all of its threads hold.
template <class T, int W, int kGroups>
struct CausalBlock {
  using L = CausalLayout<T, W, kGroups>;
  static constexpr int C = L::kChunk, kKeyTiles = C / 8, kColumns = W / 8;
  static constexpr int kQueryTiles = L::kQueryTile / 8;  // of landmarks, in columns of 8

  const CausalParams<T>& p;
  unsigned char* shared;

  // The state of a thread's landmarks: rows g and g + 8 of each 16.
  struct State {
    float sum[kGroups][kColumns][4], anchor[kGroups][2], mass[kGroups][2];
  };
  using KeyLogits = float[kGroups][kKeyTiles][4];

  PERFORMER_DEVICE int first_landmark() const { return blockIdx.z * L::kLandmarks; }
  // kMaxGrowth in units of root.
  PERFORMER_DEVICE float growth() const { return L::kMaxGrowth * p.map.inverse_root; }

  PERFORMER_DEVICE T* tile(int offset) const { return reinterpret_cast<T*>(shared + offset); }
  PERFORMER_DEVICE float* floats(int offset) const {
    return reinterpret_cast<float*>(shared + offset);
  }
  PERFORMER_DEVICE CausalPlace<T>* place() const {
    return reinterpret_cast<CausalPlace<T>*>(shared + L::kPlace);
  }
  PERFORMER_DEVICE int landmark(int group, int warp) const {  // in the block, first of 16
    return (group * L::kWarps + warp) * 16;
  }

  PERFORMER_DEVICE void Start(State& state, int64_t index, int warp, int lane) const {
    const int g = lane / 4, t = lane % 4, width = p.keys.value.width;
#pragma unroll
    for (int m = 0; m < kGroups; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = first_landmark() + landmark(m, warp) + g + 8 * e;
        const int64_t at = index * p.features + row;
        const float log_mass = row < p.features ? p.before_log_mass[at] : -kInfinity;
        const bool any = log_mass != -kInfinity;
        state.mass[m][e] = any ? 1.f : 0.f;
        state.anchor[m][e] = any ? log_mass * p.map.inverse_root : 0.f;
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int column = n * 8 + 2 * t + c;
            state.sum[m][n][2 * e + c] =
                any && column < width ? p.before_mean[at * width + column] : 0.f;
          }
      }
  }

  PERFORMER_DEVICE void Finish(const State& state, int64_t index, int rows, int warp,
                               int lane) const {
    const int g = lane / 4, t = lane % 4, width = p.keys.value.width;
    const int* poison = reinterpret_cast<const int*>(shared + L::kPoison);
#pragma unroll
    for (int m = 0; m < kGroups; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = first_landmark() + landmark(m, warp) + g + 8 * e;
        if (row >= p.features) continue;
        const int64_t at = index * p.features + row;
        const float mass = state.mass[m][e], inverse = mass == 0.f ? 0.f : 1.f / mass;
        if (t == 0)
          p.log_mass[at] = mass == 0.f ? -kInfinity : state.anchor[m][e] * p.map.root + logf(mass);
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int column = n * 8 + 2 * t + c;
            if (column < width)
              p.mean[at * width + column] = poison[column] < rows ? NAN
                                            : mass == 0.f ? 0.f
                                                          : state.sum[m][n][2 * e + c] * inverse;
          }
      }
  }

  // x = b of the warp's landmarks and the keys of a tile, -inf before `begin`.
  PERFORMER_DEVICE void Keys(KeyLogits& x, const T* keys, const float* bias, int begin, int warp,
                             int lane) const {
    const int t = lane % 4;
    const bool linear = p.map.linear();
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float start = linear ? bias[n * 8 + 2 * t + (i & 1)] : 0.f;
#pragma unroll
        for (int m = 0; m < kGroups; ++m) x[m][n][i] = start;
      }
    const uint32_t* operands = place()->operands;
#pragma unroll
    for (int s = 0; s < W / 16; ++s) {
      uint32_t a[kGroups][kFragment<T>];
#pragma unroll
      for (int m = 0; m < kGroups; ++m) {
        // Past the last landmarks: those of the first ones, whose logits are replaced below.
        const int row =
            first_landmark() + landmark(m, warp) < p.features_pad ? landmark(m, warp) : 0;
        LoadOperand<T>(a[m], operands + (row / 16 * (W / 16) + s) * 32 * kFragment<T>, lane);
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles / 2; ++n) {
        uint32_t b[kFragment<T>];
        LoadB<T, W>(b, keys, n * 16, s * 16, lane);
#pragma unroll
        for (int m = 0; m < kGroups; ++m) Mma<T>(x[m][2 * n], x[m][2 * n + 1], a[m], b);
      }
    }
    if (!linear)
#pragma unroll
      for (int m = 0; m < kGroups; ++m)
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            x[m][n][i] = MappedLogit(p.map, x[m][n][i]) + bias[n * 8 + 2 * t + (i & 1)];
    if (begin > 0) HideKeys(x, [&](int j) { return j < begin; }, lane);
    if (first_landmark() + L::kLandmarks > p.features)
#pragma unroll
      for (int m = 0; m < kGroups; ++m)
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (first_landmark() + landmark(m, warp) + lane / 4 + 8 * (i / 2) >= p.features)
              x[m][n][i] = -kInfinity;
  }

  template <class Hide>
  PERFORMER_DEVICE static void HideKeys(KeyLogits& x, Hide hide, int lane) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (hide(n * 8 + 2 * (lane % 4) + (i & 1)))
#pragma unroll
          for (int m = 0; m < kGroups; ++m) x[m][n][i] = -kInfinity;
  }

  // The anchors of a piece that begins at column `begin`; `keep` is what the old state is
  // multiplied by. Returns the first column whose key the piece may not hold, as far as this warp's
  // landmarks say.
  PERFORMER_DEVICE int Anchor(const KeyLogits& x, const float* bias, int begin, State& state,
                              float (&keep)[kGroups][2], bool (&none)[kGroups][2], int lane) const {
    const bool masked = bias[begin] == -kInfinity;
    float over = -kInfinity;  // how much a key exceeds what its landmark allows
#pragma unroll
    for (int m = 0; m < kGroups; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float first = x[m][0][2 * e];
        if (begin > 0)
#pragma unroll
          for (int n = 0; n < kKeyTiles; ++n) {
            const float even = x[m][n][2 * e], odd = x[m][n][2 * e + 1];
            if (n == begin / 8) first = begin & 1 ? odd : even;
          }
        first = __shfl_sync(kAllLanes, first, (lane & ~3) | (begin % 8 / 2));
        const float mass = state.mass[m][e];
        const float log_mass =
            mass != 0.f ? state.anchor[m][e] + log2f(mass) / p.map.unit() : -kInfinity;
        const float next = masked ? log_mass : fmaxf(log_mass, first);
        none[m][e] = next == -kInfinity;
        keep[m][e] = mass != 0.f ? Exp2((state.anchor[m][e] - next) * p.map.unit()) : 0.f;
        state.anchor[m][e] = ZeroIfNone(next);
        const float limit = none[m][e] ? -kInfinity : next + growth();
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c)
            if (x[m][n][2 * e + c] > limit) over = 1.f;
      }
    int cut = C;
    if (__any_sync(kAllLanes, over > 0.f)) {  // rare: where?
#pragma unroll
      for (int m = 0; m < kGroups; ++m)
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = n * 8 + 2 * (lane % 4) + (i & 1);
            const float limit = none[m][i / 2] ? -kInfinity : state.anchor[m][i / 2] + growth();
            // The first key itself sets the anchor.
            if (column > begin && x[m][n][i] > limit) cut = min(cut, column);
          }
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2)
        cut = min(cut, __shfl_xor_sync(kAllLanes, cut, lanes));
    }
    return cut;
  }

  // kb and the old state to shared memory, relative to the new anchors; then the state takes the
  // keys of the piece.
  PERFORMER_DEVICE void Update(KeyLogits& x, const T* values, const float (&keep)[kGroups][2],
                               const bool (&none)[kGroups][2], State& state, int warp,
                               int lane) const {
    const int g = lane / 4, t = lane % 4;
    T* const weights = tile(L::kWeights);
    T* const before = tile(L::kBefore);
    const float* feature_bias = place()->feature_bias + first_landmark();
#pragma unroll
    for (int m = 0; m < kGroups; ++m)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = landmark(m, warp) + g + 8 * e, feature = first_landmark() + row;
        const float old = state.mass[m][e] * keep[m][e];
        float added = 0;
        if (t == 0) {
          floats(L::kAnchor)[row] =
              none[m][e] || feature >= p.features
                  ? -kInfinity
                  : state.anchor[m][e] + feature_bias[row] * p.map.inverse_root;
          floats(L::kMass)[row] = old;
        }
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          float &s0 = state.sum[m][n][2 * e], &s1 = state.sum[m][n][2 * e + 1];
          s0 *= keep[m][e];
          s1 *= keep[m][e];
          StorePair(before + At<T, W>(row, n * 8 + 2 * t), s0, s1);
        }
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          float &y0 = x[m][n][2 * e], &y1 = x[m][n][2 * e + 1];
          y0 = Exp2((y0 - state.anchor[m][e]) * p.map.unit());
          y1 = Exp2((y1 - state.anchor[m][e]) * p.map.unit());
          added += y0 + y1;
          StorePair(weights + At<T, C>(row, n * 8 + 2 * t), y0, y1);
        }
        state.mass[m][e] = old + QuadSum(added);
      }
#pragma unroll
    for (int s = 0; s < C / 16; ++s) {
      uint32_t a[kGroups][kFragment<T>];
#pragma unroll
      for (int m = 0; m < kGroups; ++m) PackA<T>(a[m], x[m][2 * s], x[m][2 * s + 1]);
#pragma unroll
      for (int n = 0; n < kColumns / 2; ++n) {
        uint32_t b[kFragment<T>];
        LoadBTrans<T, W>(b, values, s * 16, n * 16, lane);
#pragma unroll
        for (int m = 0; m < kGroups; ++m)
          Mma<T>(state.sum[m][2 * n], state.sum[m][2 * n + 1], a[m], b);
      }
    }
  }

  // Sums of 16 queries over some of the landmarks, relative to exp(top).
  struct Sums {
    float num[kColumns][4], local[kKeyTiles][4], top[2], den[2];
  };

  // Over kQueryTile landmarks from `first`, one step of online softmax.
  PERFORMER_DEVICE void Queries(Sums& sums, const T* queries, int row0, int first, int lane) const {
    const int t = lane % 4;
    const float *anchor = floats(L::kAnchor) + first, *mass = floats(L::kMass) + first;
    const bool linear = p.map.linear();
    float y[kQueryTiles][4];
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) y[n][i] = linear ? anchor[n * 8 + 2 * t + (i & 1)] : 0.f;
#pragma unroll
    for (int s = 0; s < W / 16; ++s) {
      uint32_t a[kFragment<T>];
      LoadA<T, W>(a, queries, row0, s * 16, lane);
#pragma unroll
      for (int n = 0; n < kQueryTiles / 2; ++n) {
        uint32_t b[kFragment<T>];
        LoadB<T, W>(b, tile(L::kProjection), first + n * 16, s * 16, lane);
        Mma<T>(y[2 * n], y[2 * n + 1], a, b);
      }
    }
    if (!linear)
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          y[n][i] = MappedLogit(p.map, y[n][i]) + anchor[n * 8 + 2 * t + (i & 1)];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float top = sums.top[e];
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n) top = fmaxf(top, fmaxf(y[n][2 * e], y[n][2 * e + 1]));
      top = QuadMax(top);
      const float shift = ZeroIfNone(top), factor = Exp2((sums.top[e] - shift) * p.map.unit());
      sums.top[e] = top;
      sums.den[e] *= factor;
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int i = 2 * e; i < 2 * e + 2; ++i) sums.num[n][i] *= factor;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int i = 2 * e; i < 2 * e + 2; ++i) sums.local[n][i] *= factor;
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& f = y[n][2 * e + c];
          f = Exp2((f - shift) * p.map.unit());
          sums.den[e] += f * mass[n * 8 + 2 * t + c];
        }
    }
#pragma unroll
    for (int s = 0; s < kQueryTiles / 2; ++s) {
      uint32_t a[kFragment<T>];
      PackA<T>(a, y[2 * s], y[2 * s + 1]);
#pragma unroll
      for (int n = 0; n < kColumns / 2; ++n) {
        uint32_t b[kFragment<T>];
        LoadBTrans<T, W>(b, tile(L::kBefore), first + s * 16, n * 16, lane);
        Mma<T>(sums.num[2 * n], sums.num[2 * n + 1], a, b);
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles / 2; ++n) {
        if (n * 16 > row0) continue;  // above the triangle
        uint32_t b[kFragment<T>];
        LoadBTrans<T, C>(b, tile(L::kWeights), first + s * 16, n * 16, lane);
        Mma<T>(sums.local[2 * n], sums.local[2 * n + 1], a, b);
      }
    }
  }

  // The sums of the partners, each over its half of the landmarks, become those over all; of num
  // only the half of the columns that this warp will write, in `mine`.
  static constexpr int kMine = kColumns / 2;
  PERFORMER_DEVICE void Meet(Sums& sums, float (&mine)[kMine][4], int warp, int part,
                             int lane) const {
    constexpr int kLocal = 4 * kKeyTiles, kEach = L::kMeetFloats;
    __syncthreads();  // [4] everybody is done with kb and the old state
    float* const to = floats(L::kMeet) + warp * kEach * 32 + lane;
    const float* const from = floats(L::kMeet) + (L::kWarps - 1 - warp) * kEach * 32 + lane;
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) to[(4 * n + i) * 32] = sums.local[n][i];
#pragma unroll
    for (int n = 0; n < kMine; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float low = sums.num[n][i], high = sums.num[kMine + n][i];
        mine[n][i] = part ? high : low;
        to[(kLocal + 4 * n + i) * 32] = part ? low : high;
      }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      to[(kEach - 4 + e) * 32] = sums.top[e];
      to[(kEach - 2 + e) * 32] = sums.den[e];
    }
    __syncthreads();  // [5] the partner's sums are visible
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float their_top = from[(kEach - 4 + e) * 32];
      const float top = fmaxf(sums.top[e], their_top), shift = ZeroIfNone(top);
      const float a = Exp2((sums.top[e] - shift) * p.map.unit()),
                  b = Exp2((their_top - shift) * p.map.unit());
      sums.top[e] = top;
      // In the order of the landmarks, whichever partner adds.
      const auto both = [&](float x, float y) { return part ? b * y + a * x : a * x + b * y; };
      sums.den[e] = both(sums.den[e], from[(kEach - 2 + e) * 32]);
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int i = 2 * e; i < 2 * e + 2; ++i)
          sums.local[n][i] = both(sums.local[n][i], from[(4 * n + i) * 32]);
#pragma unroll
      for (int n = 0; n < kMine; ++n)
#pragma unroll
        for (int i = 2 * e; i < 2 * e + 2; ++i)
          mine[n][i] = both(mine[n][i], from[(kLocal + 4 * n + i) * 32]);
    }
  }

  // The causal mask (a selection), local v, division; rows [begin, end) of the chunk are written,
  // which begins at row `row` of the segment.
  PERFORMER_DEVICE void Write(Sums& sums, float (&mine)[kMine][4], const T* values, int row0,
                              int part, int begin, int end, int row, int lane) const {
    const int g = lane / 4, t = lane % 4;
    const int* poison = reinterpret_cast<const int*>(shared + L::kPoison);
    float inverse[2], den[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float local = 0;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = sums.local[n][2 * e + c];
          x = n * 8 + 2 * t + c <= row0 + g + 8 * e ? x : 0.f;  // kb is 0 outside the piece
          local += x;
        }
      den[e] = QuadSum(sums.den[e] + local);
      inverse[e] = den[e] == 0.f ? 0.f : 1.f / den[e];  // 0: no key seen so far
    }
#pragma unroll
    for (int n = 0; n < kMine; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) mine[n][i] *= inverse[i / 2];
#pragma unroll
    for (int s = 0; s < C / 16; ++s) {
      if (s * 16 > row0) continue;  // above the triangle
      // As weights of a mean, at most 1: half holds them whatever kb was.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums.local[2 * s][i] *= inverse[i / 2];
        sums.local[2 * s + 1][i] *= inverse[i / 2];
      }
      uint32_t a[kFragment<T>];
      PackA<T>(a, sums.local[2 * s], sums.local[2 * s + 1]);
#pragma unroll
      for (int n = 0; n < kMine / 2; ++n) {
        uint32_t b[kFragment<T>];
        LoadBTrans<T, W>(b, values, s * 16, part * (W / 2) + n * 16, lane);
        Mma<T>(mine[2 * n], mine[2 * n + 1], a, b);
      }
    }
    const int64_t head = blockIdx.y;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int r = row0 + g + 8 * e;
      if (r < begin || r >= end) continue;
      const int64_t line = (place()->row + row + r) * p.query.heads + head;  // of [rows, H]
      if (p.lse != nullptr && t == 0 && part == 0)
        p.lse[blockIdx.z * p.part_lse + line] =
            den[e] == 0.f ? -kInfinity : sums.top[e] * p.map.root + logf(den[e]);
#pragma unroll
      for (int n = 0; n < kMine; ++n) {
        const int column = part * (W / 2) + n * 8 + 2 * t;
        const auto value = [&](int c) {
          return poison[column + c] <= row + r ? NAN : inverse[e] == 0.f ? 0.f : mine[n][2 * e + c];
        };
        if (p.part_out != nullptr) {
          float* to = p.part_out + blockIdx.z * p.part_size + line * W + column;
          *reinterpret_cast<float2*>(to) = float2{value(0), value(1)};
        } else {
          StoreColumns(place()->out + static_cast<int64_t>(row + r) * p.out.stride, column,
                       p.out.width, p.out.aligned, value(0), value(1));
        }
      }
    }
  }

  // Infinities and NaN of v become 0; poison[e] = the first row, counted from `row`, that held one
  // in column e. Values as the thread copied them itself. (min has no order.)
  PERFORMER_DEVICE void RemoveWild(T* values, int row, int tid) const {
    constexpr int kChunks = W / kChunk<T>, kStep = L::kThreads / kChunks;
    int* poison = reinterpret_cast<int*>(shared + L::kPoison);
    tid = Opaque(tid);
    const int column = tid % kChunks * kChunk<T>;
#pragma unroll 1
    for (int r = tid / kChunks; r < C; r += kStep) {
      T* x = values + At<T, W>(r, column);
      bool wild = false;
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) wild |= !IsFinite(x[i]);
      if (!wild) continue;
#pragma unroll 1
      for (int i = 0; i < kChunk<T>; ++i)
        if (!IsFinite(x[i])) {
          x[i] = FromFloat<T>(0.f);
          atomicMin(poison + column + i, row + r);
        }
    }
  }
};

template <class T, int W, int kGroups>
__global__ void __launch_bounds__(CausalLayout<T, W, kGroups>::kThreads, 1)
    CausalKernel(CausalParams<T> p) {
  using Block = CausalBlock<T, W, kGroups>;
  using L = CausalLayout<T, W, kGroups>;
  constexpr int C = L::kChunk;
  PERFORMER_SHARED_MEMORY(shared);
  const int tid = threadIdx.x;
  const Item item = Locate(p.segments, blockIdx.x);
  const int64_t head = blockIdx.y, group = p.group_of(head);
  const int first_landmark = blockIdx.z * L::kLandmarks;
  const Block block = {p, shared};
  if (tid == 0) {
    const int64_t row = item.first_row + item.begin;
    *block.place() = {
        p.query.Row(row, head), p.out.Row(row, head),
        p.feature_bias +
            QueryHeadIndex(p.feature_bias_heads, head, p.query.heads, group) * p.features,
        p.key_operands + (p.key_head_step * group + first_landmark) * p.operand_row, row};
  }
  KeyStream<T, W, L::kThreads, C> stream(p.keys, p.map, item, group, shared + L::kStream, tid);
  const int chunks = (stream.place->rows + C - 1) / C;
  const auto issue = [&](int chunk, int buffer) {
    const int rows = stream.place->rows - chunk * C;
    CopyRows<T, W, C, L::kThreads>(block.tile(L::kQuery + buffer * L::kTileBytes),
                                   block.place()->query, chunk * C, p.query, tid,
                                   [&](int r) { return r < rows; });
    stream.Issue(chunk, buffer, block.tile(L::kKey + buffer * L::kTileBytes),
                 block.tile(L::kValue + buffer * L::kTileBytes), tid);
  };
  const T* w = p.projection.At(QueryHeadIndex(p.projection.heads, head, p.query.heads, group),
                               p.features_pad, W) +
               static_cast<int64_t>(first_landmark) * W;
  CopyOperand<T, W, L::kLandmarks, L::kThreads>(
      block.tile(L::kProjection), w, static_cast<int>(p.features_pad) - first_landmark, tid);
  for (int column = tid; column < W; column += L::kThreads)
    reinterpret_cast<int*>(shared + L::kPoison)[column] = INT32_MAX;
  typename Block::State state;
  block.Start(state,
              p.before_each ? blockIdx.x * p.groups + group
                            : (p.before_count == 1 ? 0 : item.sequence) * p.groups + group,
              tid / 32, tid % 32);
  stream.Fetch(0, tid);
  if constexpr (L::kStages == 2) {
    stream.Publish(0, tid);
    __syncthreads();
    issue(0, 0);
    stream.Fetch(1, tid);
  }

#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int buffer = L::kStages == 2 ? chunk & 1 : 0;
    const int row = chunk * C, rows = min(C, stream.place->rows - row);
    const T* queries = block.tile(L::kQuery + buffer * L::kTileBytes);
    const T* keys = block.tile(L::kKey + buffer * L::kTileBytes);
    T* values = block.tile(L::kValue + buffer * L::kTileBytes);
    const float* bias = stream.bias + buffer * C;
    if constexpr (L::kStages == 1) {
      stream.Publish(0, tid);
      __syncthreads();  // [0] nobody reads the last chunk any more
      issue(chunk, 0);
      stream.Fetch(chunk + 1, tid);
    }
    CpAsyncWait<0>();
    stream.Arrived(buffer, keys, tid);
    if constexpr (L::kStages == 2) stream.Publish(buffer ^ 1, tid);
    __syncthreads();  // [1] the chunk is complete; the other buffers are free
    if constexpr (L::kStages == 2)
      if (chunk + 1 < chunks) {
        issue(chunk + 1, buffer ^ 1);
        stream.Fetch(chunk + 2, tid);
      }
    block.RemoveWild(values, row, tid);  // nobody reads v before [2], or poison before [5]

    int end;
#pragma unroll 1
    for (int begin = 0; begin < rows; begin = end) {  // the pieces
      const int id = Opaque(tid), warp = id / 32, lane = id % 32;
      // Partners are warps i and kWarps - 1 - i, so that the two warps of a scheduler share out the
      // triangle: row tiles i and kRowTiles - 1 - i.
      const int part = warp / L::kRowTiles;
      const int row0 = (part ? L::kWarps - 1 - warp : warp) * 16;
      {
        typename Block::KeyLogits x;
        float keep[kGroups][2];
        bool none[kGroups][2];
        block.Keys(x, keys, bias, begin, warp, lane);
        const int cut = block.Anchor(x, bias, begin, state, keep, none, lane);
        int* cuts = reinterpret_cast<int*>(shared + L::kCuts);
        if (lane == 0) cuts[warp] = cut;
        __syncthreads();  // [2] cuts are known; what the last piece shared is done with
        end = C;
#pragma unroll
        for (int i = 0; i < L::kWarps; ++i) end = min(end, cuts[i]);
        if (end < C) Block::HideKeys(x, [&](int j) { return j >= end; }, lane);
        block.Update(x, values, keep, none, state, warp, lane);
      }
      __syncthreads();  // [3] kb, the old state and its anchors are visible
      typename Block::Sums sums;
#pragma unroll
      for (int n = 0; n < Block::kColumns; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.num[n][i] = 0.f;
#pragma unroll
      for (int n = 0; n < Block::kKeyTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.local[n][i] = 0.f;
#pragma unroll
      for (int e = 0; e < 2; ++e) sums.top[e] = -kInfinity, sums.den[e] = 0.f;
#pragma unroll 1
      for (int first = 0; first < L::kLandmarks / 2; first += L::kQueryTile)
        block.Queries(sums, queries, row0, part * (L::kLandmarks / 2) + first, lane);
      float mine[Block::kMine][4];
      block.Meet(sums, mine, warp, part, lane);
      block.Write(sums, mine, values, row0, part, begin, min(end, rows), row, lane);
    }
  }
  const Item same = Locate(p.segments, blockIdx.x);  // not kept: registers are short
  const int id = Opaque(tid);
  if (same.last() && head % (p.query.heads / p.groups) == 0)
    block.Finish(state, same.sequence * p.groups + group, stream.place->rows, id / 32, id % 32);
}

}  // namespace cuda
}  // namespace performer
