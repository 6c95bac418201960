// The state of one sequence and key/value head: its form in tensors (log_mass, mean), and its form
// in kernels, sums relative to 2^anchor.
#pragma once
#include "cpu/memory/layout.h"
#include "cpu/simd/math.h"

PERFORMER_ISA_BEGIN

// A state in tensors: natural logarithms, rows without padding.
template <class Acc>
struct LoadedState {
  const Acc* log_mass;  // [m]
  const Acc* mean;      // [m][e]

  LoadedState(const State& state, const Dims& dims, int64_t sequence, int64_t group) {
    const int64_t at = ((state.count == 1 ? 0 : sequence) * dims.groups + group) * dims.features;
    log_mass = static_cast<const Acc*>(state.log_mass) + at;
    mean = static_cast<const Acc*>(state.mean) + at * dims.value_dim;
  }
  // log_mass[m] in base 2, without the rounding that Acc would add.
  double Log2Mass(int64_t m) const { return kLog2eDouble * static_cast<double>(log_mass[m]); }
  // to [m][e_pad] = the means with padding, 0 where the feature has seen no key.
  void CopyMean(const Strides& strides, Acc* to) const {
    for (int64_t m = 0; m < strides.m; ++m) {
      const Acc* from = mean + m * strides.e;
      Acc* row = to + m * strides.e_pad;
      const int64_t given = log_mass[m] == -kInf<Acc> ? 0 : strides.e;
      for (int64_t e = 0; e < given; ++e) row[e] = from[e];
      for (int64_t e = given; e < strides.e_pad; ++e) row[e] = 0;
    }
  }
};

// centre[e] = the average of mean[m][e] = sum[m][e] / mass[m] over the features that have seen a
// key; 0 if it is not finite. `at(m, e)` gives sum[m][e]. False, and 0, if no feature has seen one.
//
// Attention to values less a vector is attention to the values, less that vector. Its gradients
// stay the same, but what values have in common no longer hides their differences in rounding
// errors.
template <class Acc, class Sum>
bool Centre(const Strides& strides, const Acc* mass, Sum at, Acc* centre) {
  int64_t count = 0;
  for (int64_t e = 0; e < strides.e_pad; ++e) centre[e] = 0;
  for (int64_t m = 0; m < strides.m; ++m) {
    if (!(mass[m] > 0)) continue;
    ++count;
    const Acc inverse = 1 / mass[m];
    for (int64_t e = 0; e < strides.e; ++e) centre[e] += at(m, e) * inverse;
  }
  for (int64_t e = 0; e < strides.e; ++e) {
    centre[e] = count > 0 ? centre[e] / static_cast<Acc>(count) : Acc(0);
    if (!(centre[e] - centre[e] == 0)) centre[e] = 0;
  }
  return count > 0;
}

// The same of the means of a state; empty features do not count.
template <class Acc>
bool CentreOfMeans(const Strides& strides, const Acc* log_mass, const Acc* mean, int64_t stride,
                   Acc* mass, Acc* centre) {
  for (int64_t m = 0; m < strides.m; ++m) mass[m] = log_mass[m] == -kInf<Acc> ? 0 : 1;
  return Centre<Acc>(
      strides, mass, [&](int64_t m, int64_t e) { return mean[m * stride + e]; }, centre);
}

// rows[n][e_pad] -= centre.
template <class Acc>
void SubtractCentre(const Strides& strides, int64_t n, const Acc* centre, Acc* rows) {
  for (int64_t j = 0; j < n; ++j)
    for (int64_t e = 0; e < strides.e_pad; e += kLanes<Acc>) {
      Acc* at = rows + j * strides.e_pad + e;
      Store(at, Load(at) - Load(centre + e));
    }
}

// x as Acc, rounded up or down with probabilities that make the expected error 0 (stochastic
// rounding). The coin is a hash of x and `salt`, so that equal calls give equal bits.
//
// A log_mass that is rounded to nearest at every token drifts: after a million tokens one of them
// adds less than an ulp, and the same rounding again and again. Only a stream of identical tokens
// tosses the same coin again.
template <class Acc>
PERFORMER_INLINE Acc RoundStochastically(double x, int64_t salt) {
  if constexpr (sizeof(Acc) == sizeof(double)) return x;
  if (!(__builtin_fabs(x) < 3e38)) return static_cast<Acc>(x);
  constexpr uint64_t kDropped = (uint64_t{1} << 29) - 1;  // the bits that float does not have
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  uint64_t coin = (bits + static_cast<uint64_t>(salt) * 0xD1B54A32D192ED03) * 0x9E3779B97F4A7C15;
  coin = (coin ^ (coin >> 32)) * 0xD6E8FEB86659FD93;  // a multiplicative hash, its upper bits
  bits = (bits + ((coin >> 32) & kDropped)) & ~kDropped;
  double rounded;
  __builtin_memcpy(&rounded, &bits, sizeof rounded);
  return static_cast<Acc>(rounded);
}

// log_mass[m] and mean[m][e] of sums [m][e_pad] and masses relative to 2^anchor; -inf and 0 where
// the mass is 0.
template <class Acc>
void WriteState(const Strides& strides, const Acc* anchor, const Acc* mass, const Acc* sum,
                Acc* log_mass, Acc* mean) {
  for (int64_t m = 0; m < strides.m; ++m) {
    const bool nothing = mass[m] == 0;
    const double log2_mass =
        static_cast<double>(anchor[m]) + __builtin_log2(static_cast<double>(mass[m]));
    log_mass[m] = nothing ? -kInf<Acc> : static_cast<Acc>(kLn2Double * log2_mass);
    const Acc inverse = nothing ? Acc(0) : 1 / mass[m];
    for (int64_t e = 0; e < strides.e; ++e)
      mean[m * strides.e + e] = nothing ? Acc(0) : sum[m * strides.e_pad + e] * inverse;
  }
}

// The same for the state `before` and further keys, whose sums these are. Errors of very many calls
// in a row do not add up: the weights of the two means are exactly 1 together, and log_mass is
// rounded stochastically. Where there are no further keys, the state stays as it is.
template <class Acc>
void WriteNextState(const Strides& strides, const LoadedState<Acc>& before, const Acc* anchor,
                    const Acc* mass, const Acc* sum, Acc* log_mass, Acc* mean) {
  for (int64_t m = 0; m < strides.m; ++m) {
    const bool empty = before.log_mass[m] == -kInf<Acc>;  // its mean may hold anything
    const Acc *from = before.mean + m * strides.e, *row = sum + m * strides.e_pad;
    Acc* to = mean + m * strides.e;
    if (mass[m] == 0) {
      log_mass[m] = before.log_mass[m];
      for (int64_t e = 0; e < strides.e; ++e) to[e] = empty ? Acc(0) : from[e];
      continue;
    }
    const double more = static_cast<double>(mass[m]);
    const double a = before.Log2Mass(m), b = static_cast<double>(anchor[m]) + __builtin_log2(more);
    const double x = empty ? 0 : __builtin_exp2(-__builtin_fabs(a - b)), weight = x / (1 + x);
    const double log2_mass = (a >= b ? a : b) + kLog2eDouble * __builtin_log1p(x);
    log_mass[m] = RoundStochastically<Acc>(kLn2Double * log2_mass, m);
    for (int64_t e = 0; e < strides.e; ++e) {
      const double v = static_cast<double>(row[e]) / more;
      const double u = empty ? 0 : static_cast<double>(from[e]);
      to[e] = static_cast<Acc>(a >= b ? u + weight * (v - u) : v + weight * (u - v));
    }
  }
}

// States that are to be merged, in this order.
template <class Acc>
struct StateList {
  static constexpr int kMax = 6;
  SummaryPartial<Acc> state[kMax];
  int count = 0;

  void Add(const SummaryPartial<Acc>& added) { state[count++] = added; }
};

template <int kCount, class Acc>
void MergeCounted(const Strides& strides, const SummaryPartial<Acc>* from,
                  const SummaryPartial<Acc>& to) {
  for (int64_t m0 = 0; m0 < strides.m_pad; m0 += kLanes<Acc>) {
    Vec<Acc> anchor = Load(from[0].anchor + m0), mass = {}, weight[kCount];
    const Vec<Acc> zero = {};
    for (int i = 1; i < kCount; ++i) anchor = Max(anchor, Load(from[i].anchor + m0));
    const Vec<Acc> base = anchor == -kInf<Acc> ? zero : anchor;
    for (int i = 0; i < kCount; ++i) {
      weight[i] = Exp2(Load(from[i].anchor + m0) - base);
      mass += weight[i] * Load(from[i].mass + m0);
    }
    Store(to.anchor + m0, anchor);
    Store(to.mass + m0, mass);
    for (int64_t m = m0; m < m0 + kLanes<Acc> && m < strides.m; ++m)
      for (int64_t e = m * strides.e_pad; e < (m + 1) * strides.e_pad; e += kLanes<Acc>) {
        Vec<Acc> sum = weight[0][m - m0] * Load(from[0].sum + e);
        PERFORMER_UNROLL
        for (int i = 1; i < kCount; ++i) sum += weight[i][m - m0] * Load(from[i].sum + e);
        Store(to.sum + e, sum);
      }
  }
}

// to = the merged states of a list of two or more, with their padding, relative to the largest
// anchor. It may be one of them.
template <class Acc>
void MergeStates(const Strides& strides, const StateList<Acc>& list,
                 const SummaryPartial<Acc>& to) {
  static_assert(StateList<Acc>::kMax == 6);
  switch (list.count) {
    case 2:
      return MergeCounted<2>(strides, list.state, to);
    case 3:
      return MergeCounted<3>(strides, list.state, to);
    case 4:
      return MergeCounted<4>(strides, list.state, to);
    case 5:
      return MergeCounted<5>(strides, list.state, to);
    default:
      return MergeCounted<6>(strides, list.state, to);
  }
}

// Merges `more` into `into`.
template <class Acc>
void MergeSummaries(const Strides& strides, SummaryPartial<Acc> into, SummaryPartial<Acc> more) {
  const SummaryPartial<Acc> both[] = {into, more};
  MergeCounted<2>(strides, both, into);
}

PERFORMER_ISA_END
