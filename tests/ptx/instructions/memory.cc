// Loads, stores, atomics, asynchronous copies, kinds of addresses, and moves between registers of
// different widths.
#include <algorithm>

#include "ptx/instructions/table.h"

namespace performer {
namespace ptx {
namespace {

template <uint64_t kWindow, bool kToGeneric>
void ConvertAddress(Warp& warp, const Instruction& i, uint32_t lanes) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!Has(lanes, lane)) continue;
    const auto address = Get<uint64_t>(warp, i.operands[1], lane);
    if (!kToGeneric && kWindow != 0 && (address & kWindow) == 0)
      throw Error("an address is not in the space that it is converted to");
    Set<uint64_t>(warp, i.operands[0], lane, kToGeneric ? address | kWindow : address & ~kWindow);
  }
}

void Load(Warp& warp, const Instruction& i, uint32_t lanes) {
  const int bytes = i.bytes * i.count;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!Has(lanes, lane)) continue;
    const unsigned char* from =
        warp.Locate(i.space, warp.AddressIn(i.addresses[0], lane), bytes, bytes, false, lane);
    for (int n = 0; n < i.count; ++n, from += i.bytes) {
      uint64_t value = 0;
      std::memcpy(&value, from, i.bytes);
      if (i.number != 0) {  // signed
        const int unused = 64 - 8 * i.bytes;
        value = static_cast<uint64_t>(static_cast<int64_t>(value << unused) >> unused);
      }
      if (i.wide) {
        Set<uint64_t>(warp, i.operands[n], lane, value);
      } else {
        Set<uint32_t>(warp, i.operands[n], lane, static_cast<uint32_t>(value));
      }
    }
  }
}
void Store(Warp& warp, const Instruction& i, uint32_t lanes) {
  const int bytes = i.bytes * i.count;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!Has(lanes, lane)) continue;
    unsigned char* to =
        warp.Locate(i.space, warp.AddressIn(i.addresses[0], lane), bytes, bytes, true, lane);
    for (int n = 0; n < i.count; ++n, to += i.bytes) {
      const uint64_t value = i.wide ? Get<uint64_t>(warp, i.operands[n], lane)
                                    : Get<uint32_t>(warp, i.operands[n], lane);
      std::memcpy(to, &value, i.bytes);
    }
  }
}

bool TakeSpace(const std::string& part, Space* space) {
  static const std::map<std::string, Space> spaces = {{"global", Space::kGlobal},
                                                      {"shared", Space::kShared},
                                                      {"local", Space::kLocal},
                                                      {"param", Space::kParam}};
  const auto found = spaces.find(part);
  if (found != spaces.end()) *space = found->second;
  return found != spaces.end();
}

// atom: lanes take turns.
template <class T, class F>
void Atomic(Warp& warp, const Instruction& i, uint32_t lanes, F function) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!Has(lanes, lane)) continue;
    unsigned char* const at = warp.Locate(i.space, warp.AddressIn(i.addresses[0], lane), sizeof(T),
                                          sizeof(T), true, lane);
    T before;
    std::memcpy(&before, at, sizeof before);
    const T after = function(before, Get<T>(warp, i.operands[1], lane));
    std::memcpy(at, &after, sizeof after);
    if (i.operands[0] != kNone) Set<T>(warp, i.operands[0], lane, before);
  }
}
template <class T>
Action AtomicAction(const std::string& name) {
  if (name == "add")
    return [](Warp& w, const Instruction& i, uint32_t lanes) {
      Atomic<T>(w, i, lanes, [](T x, T y) { return static_cast<T>(x + y); });
    };
  if (name == "min")
    return [](Warp& w, const Instruction& i, uint32_t lanes) {
      Atomic<T>(w, i, lanes, [](T x, T y) { return x < y ? x : y; });
    };
  if (name == "max")
    return [](Warp& w, const Instruction& i, uint32_t lanes) {
      Atomic<T>(w, i, lanes, [](T x, T y) { return x > y ? x : y; });
    };
  return nullptr;
}

void CopyAsync(Warp& warp, const Instruction& i, uint32_t lanes) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!Has(lanes, lane)) continue;
    const auto valid = Get<uint32_t>(warp, i.operands[0], lane);
    if (valid > static_cast<uint64_t>(i.number)) throw Error("a copy reads more than it writes");
    warp.CopyAsync(lane, warp.AddressIn(i.addresses[0], lane), warp.AddressIn(i.addresses[1], lane),
                   static_cast<int>(i.number), static_cast<int>(valid));
  }
}
void CommitCopies(Warp& warp, const Instruction&, uint32_t lanes) {
  for (int lane = 0; lane < kLanes; ++lane)
    if (Has(lanes, lane)) warp.CommitCopies(lane);
}
void WaitForCopies(Warp& warp, const Instruction& i, uint32_t lanes) {
  for (int lane = 0; lane < kLanes; ++lane)
    if (Has(lanes, lane)) warp.WaitForCopies(lane, static_cast<size_t>(i.number));
}

void Join(Warp& warp, const Instruction& i, uint32_t lanes) {
  const int width = static_cast<int>(i.number) / i.count;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!Has(lanes, lane)) continue;
    uint64_t value = 0;
    for (int part = 0; part < i.count; ++part) {
      const uint64_t bits = warp.Words(i.operands[1 + part])[lane];
      value |= (bits & ((uint64_t{1} << width) - 1)) << (width * part);
    }
    if (i.number == 64) {
      Set<uint64_t>(warp, i.operands[0], lane, value);
    } else {
      Set<uint32_t>(warp, i.operands[0], lane, static_cast<uint32_t>(value));
    }
  }
}
void Separate(Warp& warp, const Instruction& i, uint32_t lanes) {
  const int width = static_cast<int>(i.number) / i.count;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!Has(lanes, lane)) continue;
    const uint64_t value = i.number == 64 ? Get<uint64_t>(warp, i.operands[0], lane)
                                          : Get<uint32_t>(warp, i.operands[0], lane);
    for (int part = 0; part < i.count; ++part)
      Set<uint32_t>(warp, i.operands[1 + part], lane,
                    static_cast<uint32_t>(value >> (width * part) & ((uint64_t{1} << width) - 1)));
  }
}

}  // namespace

// ld and st: space, .nc, .v2, .v4, type.
bool BuildAccess(const std::vector<std::string>& parts, const std::vector<std::string>& texts,
                 Operands& operands, Instruction* i) {
  const bool load = parts[0] == "ld";
  i->count = 1;
  for (size_t p = 1; p + 1 < parts.size(); ++p) {
    if (TakeSpace(parts[p], &i->space) || parts[p] == "nc") continue;
    if (parts[p] != "v2" && parts[p] != "v4") return false;
    i->count = static_cast<uint8_t>(parts[p][1] - '0');
  }
  const int bits = TakeType(parts.back());
  if (bits == 0 || texts.size() != 2) return false;
  i->act = load ? Load : Store;
  i->bytes = static_cast<uint8_t>(bits / 8);
  i->number = parts.back()[0] == 's';
  i->addresses[0] = operands.AddressOf(texts[load ? 1 : 0]);
  const std::vector<std::string> values = Parts(texts[load ? 0 : 1]);
  if (values.size() != i->count) return false;
  for (size_t n = 0; n < values.size(); ++n) {
    // A register may be wider than what is loaded or stored.
    const int wanted = std::max({operands.BitsOf(values[n]), bits, 16});
    if (n > 0 && i->wide != (wanted == 64)) return false;
    i->wide = wanted == 64;
    i->operands[n] = load ? operands.Result(values[n], wanted) : operands.Source(values[n], wanted);
  }
  return true;
}

// atom or red, of 32 bits: space, operation, type.
bool BuildAtomic(const std::vector<std::string>& parts, const std::vector<std::string>& texts,
                 Operands& operands, Instruction* i) {
  const bool returns = parts[0] == "atom";
  if (parts.size() < 3 || texts.size() != (returns ? 3u : 2u)) return false;
  for (size_t p = 1; p + 2 < parts.size(); ++p)
    if (!TakeSpace(parts[p], &i->space)) return false;
  const std::string &name = parts[parts.size() - 2], &type = parts.back();
  if (type == "s32") i->act = AtomicAction<int32_t>(name);
  if (type == "u32") i->act = AtomicAction<uint32_t>(name);
  if (i->act == nullptr) return false;
  i->operands[0] = returns ? operands.Result(texts[0], 32) : kNone;
  i->addresses[0] = operands.AddressOf(texts[returns ? 1 : 0]);
  i->operands[1] = operands.Source(texts[returns ? 2 : 1], 32);
  return true;
}

void BuildPackedMove(int bits, const std::vector<std::string>& texts, Operands& operands,
                     Instruction* i) {
  const bool joins = texts[1].front() == '{';
  const std::vector<std::string> parts = Parts(texts[joins ? 1 : 0]);
  const int width = bits / static_cast<int>(parts.size());
  i->act = joins ? Join : Separate;
  i->number = bits;
  i->count = static_cast<uint8_t>(parts.size());
  i->operands[0] = joins ? operands.Result(texts[0], bits) : operands.Source(texts[1], bits);
  for (size_t part = 0; part < parts.size(); ++part)
    i->operands[1 + part] =
        joins ? operands.Source(parts[part], width) : operands.Result(parts[part], width);
}

void DefineMemory(Table& t) {
  DefineBuilt(t, "cp.async.cg.shared.global", 4,
              [](const Texts& texts, Operands& operands, Instruction* i) {
                if (texts[2] != "16") throw Error("copies must be of 16 bytes");
                i->act = CopyAsync;
                i->number = 16;
                for (int n = 0; n < 2; ++n) i->addresses[n] = operands.AddressOf(texts[n]);
                i->operands[0] = operands.Source(texts[3], 32);
              });
  DefineBuilt(t, "cp.async.commit_group", 0,
              [](const Texts&, Operands&, Instruction* i) { i->act = CommitCopies; });
  DefineBuilt(t, "cp.async.wait_group", 1, [](const Texts& texts, Operands&, Instruction* i) {
    i->act = WaitForCopies;
    i->number = std::stoi(texts[0]);
  });
  t["cvta.to.global.u64"] = {{64, 64}, ConvertAddress<0, false>};
  t["cvta.global.u64"] = {{64, 64}, ConvertAddress<0, true>};
  t["cvta.to.shared.u64"] = {{64, 64}, ConvertAddress<kSharedWindow, false>};
  t["cvta.shared.u64"] = {{64, 64}, ConvertAddress<kSharedWindow, true>};
  t["cvta.to.local.u64"] = {{64, 64}, ConvertAddress<kLocalWindow, false>};
  t["cvta.local.u64"] = {{64, 64}, ConvertAddress<kLocalWindow, true>};
}

}  // namespace ptx
}  // namespace performer
