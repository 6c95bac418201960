// What the lanes of a warp do together: shuffles, votes, ldmatrix and mma. How tensor cores add is left
// open by PTX; here they do as sim/tensor_cores.h.
#include "ptx/instructions/table.h"

namespace performer {
namespace ptx {
namespace {

enum class From { kIndex, kButterfly, kUp, kDown };
template <From kFrom>
void Shuffle(Warp& warp, const Instruction& i, uint32_t lanes) {
  uint32_t result[kLanes] = {}, valid = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!Has(lanes, lane)) continue;
    const int b = static_cast<int>(Get<uint32_t>(warp, i.operands[2], lane) & 31);
    const auto c = Get<uint32_t>(warp, i.operands[3], lane);
    const int mask = static_cast<int>(c >> 8 & 31), clamp = static_cast<int>(c & 31);
    const int first = lane & mask, last = first | (clamp & ~mask);
    int source = kFrom == From::kIndex       ? first | (b & ~mask)
                 : kFrom == From::kButterfly ? lane ^ b
                 : kFrom == From::kUp        ? lane - b
                                             : lane + b;
    const bool in_range = kFrom == From::kUp ? source >= last : source <= last;
    if (!in_range) source = lane;
    if (!Has(lanes, source)) throw Error("a shuffle reads a lane that takes no part");
    valid |= static_cast<uint32_t>(in_range) << lane;
    result[lane] = Get<uint32_t>(warp, i.operands[1], source);
  }
  for (int lane = 0; lane < kLanes; ++lane)
    if (Has(lanes, lane)) Set<uint32_t>(warp, i.operands[0], lane, result[lane]);
  if (i.operands[4] != kNone) SetPredicate(warp, i.operands[4], lanes, valid);
}
template <From kFrom>
void BuildShuffle(const std::vector<std::string>& texts, Operands& operands, Instruction* i) {
  const size_t bar = texts[0].find('|');
  i->kind = Kind::kCollective;
  i->act = Shuffle<kFrom>;
  i->operands[0] = operands.Result(texts[0].substr(0, bar), 32);
  for (int n = 1; n < 4; ++n) i->operands[n] = operands.Source(texts[n], 32);
  i->operands[4] = bar == std::string::npos ? kNone : operands.Result(texts[0].substr(bar + 1), 1);
  i->members = operands.Source(texts[4], 32);
}

void VoteAny(Warp& warp, const Instruction& i, uint32_t lanes) {
  SetPredicate(warp, i.operands[0], lanes, (*warp.Words(i.operands[1]) & lanes) != 0 ? kAll : 0);
}
void VoteAll(Warp& warp, const Instruction& i, uint32_t lanes) {
  SetPredicate(warp, i.operands[0], lanes, (~*warp.Words(i.operands[1]) & lanes) == 0 ? kAll : 0);
}
template <Action kAct>
void BuildVote(const std::vector<std::string>& texts, Operands& operands, Instruction* i) {
  i->kind = Kind::kCollective;
  i->act = kAct;
  i->operands[0] = operands.Result(texts[0], 1);
  i->operands[1] = operands.Source(texts[1], 1);
  i->members = operands.Source(texts[2], 32);
}

void Nothing(Warp&, const Instruction&, uint32_t) {}

// Four matrices of 8x8 numbers of 16 bits; lane 8 n + r names row r of matrix n.
template <bool kTransposed>
void LoadMatrices(Warp& warp, const Instruction& i, uint32_t) {
  uint16_t rows[kLanes][8];
  for (int lane = 0; lane < kLanes; ++lane)
    std::memcpy(
        rows[lane],
        warp.Locate(Space::kShared, warp.AddressIn(i.addresses[0], lane), 16, 16, false, lane), 16);
  for (int n = 0; n < 4; ++n)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const auto at = [&](int r, int c) {
        return uint32_t{kTransposed ? rows[8 * n + c][r] : rows[8 * n + r][c]};
      };
      Set<uint32_t>(warp, i.operands[n], lane, at(row, column) | at(row, column + 1) << 16);
    }
}
template <bool kTransposed>
void BuildLoadMatrices(const std::vector<std::string>& texts, Operands& operands, Instruction* i) {
  i->kind = Kind::kCollective;
  i->act = LoadMatrices<kTransposed>;
  const std::vector<std::string> results = Parts(texts[0]);
  for (int n = 0; n < 4; ++n) i->operands[n] = operands.Result(results.at(n), 32);
  i->addresses[0] = operands.AddressOf(texts[1]);
}

// ---- Tensor cores. Fragments are those of "Matrix fragments for mma" in the PTX ISA.

enum class Factor { kBFloat16, kHalf, kTf32 };
template <Factor kFactor>
void MultiplyMatrices(Warp& warp, const Instruction& i, uint32_t) {
  constexpr bool k16 = kFactor != Factor::kTf32;
  constexpr int kDepth = k16 ? 16 : 8;
  float a[16][kDepth], b[kDepth][8], d[16][8];
  const auto widened = [](uint32_t bits) {
    const auto half = static_cast<uint16_t>(bits);
    return kFactor == Factor::kHalf ? Widened<Half>(half) : Widened<BFloat16>(half);
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int n = 0; n < 4; ++n) {
      d[g + 8 * (n / 2)][2 * t + n % 2] = Get<float>(warp, i.operands[10 + n], lane);
      const auto word = Get<uint32_t>(warp, i.operands[4 + n], lane);
      if (k16) {
        a[g + 8 * (n % 2)][2 * t + 8 * (n / 2)] = widened(word);
        a[g + 8 * (n % 2)][2 * t + 8 * (n / 2) + 1] = widened(word >> 16);
      } else {
        a[g + 8 * (n % 2)][t + 4 * (n / 2)] = FromBits(word & ~0x1fffu);
      }
    }
    for (int n = 0; n < 2; ++n) {
      const auto word = Get<uint32_t>(warp, i.operands[8 + n], lane);
      if (k16) {
        b[2 * t + 8 * n][g] = widened(word);
        b[2 * t + 8 * n + 1][g] = widened(word >> 16);
      } else {
        b[t + 4 * n][g] = FromBits(word & ~0x1fffu);
      }
    }
  }
  constexpr int kLeast = kFactor == Factor::kHalf ? -14 : -126;
  sim::AddProducts(TheOptions().tensor_cores, kDepth, kLeast, a[0], b[0], d[0]);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int n = 0; n < 4; ++n)
      Set<float>(warp, i.operands[n], lane, d[lane / 4 + 8 * (n / 2)][lane % 4 * 2 + n % 2]);
}
template <Factor kFactor>
void BuildProduct(const std::vector<std::string>& texts, Operands& operands, Instruction* i) {
  i->kind = Kind::kCollective;
  i->act = MultiplyMatrices<kFactor>;
  Place* to = i->operands;
  constexpr size_t kCounts[] = {4, 4, 2, 4};
  for (size_t n = 0; n < 4; ++n) {
    const std::vector<std::string> registers = Parts(texts[n]);
    if (registers.size() != kCounts[n]) throw Error("mma with other fragments");
    for (const std::string& text : registers)
      *to++ = n == 0 ? operands.Result(text, 32) : operands.Source(text, 32);
  }
}

}  // namespace

void DefineWarp(Table& t) {
  DefineBuilt(t, "bar.warp.sync", 1, [](const Texts& texts, Operands& operands, Instruction* i) {
    i->kind = Kind::kCollective;
    i->act = Nothing;
    i->members = operands.Source(texts[0], 32);
  });
  DefineBuilt(t, "shfl.sync.idx.b32", 5, BuildShuffle<From::kIndex>);
  DefineBuilt(t, "shfl.sync.bfly.b32", 5, BuildShuffle<From::kButterfly>);
  DefineBuilt(t, "shfl.sync.up.b32", 5, BuildShuffle<From::kUp>);
  DefineBuilt(t, "shfl.sync.down.b32", 5, BuildShuffle<From::kDown>);
  DefineBuilt(t, "vote.sync.any.pred", 3, BuildVote<VoteAny>);
  DefineBuilt(t, "vote.sync.all.pred", 3, BuildVote<VoteAll>);
  DefineBuilt(t, "ldmatrix.sync.aligned.m8n8.x4.shared.b16", 2, BuildLoadMatrices<false>);
  DefineBuilt(t, "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", 2, BuildLoadMatrices<true>);
  const std::string mma = "mma.sync.aligned.";
  DefineBuilt(t, mma + "m16n8k16.row.col.f32.bf16.bf16.f32", 4, BuildProduct<Factor::kBFloat16>);
  DefineBuilt(t, mma + "m16n8k16.row.col.f32.f16.f16.f32", 4, BuildProduct<Factor::kHalf>);
  DefineBuilt(t, mma + "m16n8k8.row.col.f32.tf32.tf32.f32", 4, BuildProduct<Factor::kTf32>);
}

}  // namespace ptx
}  // namespace performer
