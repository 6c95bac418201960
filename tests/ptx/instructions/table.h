// How the table of instructions is made. A file of this folder holds those of one kind: their
// semantics, which are those of the PTX ISA, and their names.
#pragma once
#include <cstring>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/half.h"
#include "ptx/machine.h"

namespace performer {
namespace ptx {

// ---- Values of lanes

// Values of up to 32 bits lie in words, whose upper bits count for nothing.
template <class T>
using Stored = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T>
T FromStored(Stored<T> bits) {
  if constexpr (std::is_floating_point_v<T>) {
    T x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  } else {
    return static_cast<T>(bits);
  }
}
template <class T>
Stored<T> ToStored(T x) {
  if constexpr (std::is_floating_point_v<T>) {
    Stored<T> bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
  } else {
    return static_cast<Stored<T>>(x);
  }
}
template <class T>
Stored<T>* StoredAt(Warp& warp, Place place) {
  if constexpr (sizeof(T) == 8) {
    return warp.Doubles(place);
  } else {
    return warp.Words(place);
  }
}
template <class T>
T Get(Warp& warp, Place place, int lane) {
  if constexpr (std::is_same_v<T, bool>) {
    return (*warp.Words(place) >> lane & 1) != 0;
  } else {
    return FromStored<T>(StoredAt<T>(warp, place)[lane]);
  }
}
template <class T>
void Set(Warp& warp, Place place, int lane, T x) {
  StoredAt<T>(warp, place)[lane] = ToStored(x);
}
inline bool Has(uint32_t lanes, int lane) { return (lanes >> lane & 1) != 0; }
inline void SetPredicate(Warp& warp, Place place, uint32_t lanes, uint32_t value) {
  uint32_t& word = *warp.Words(place);
  word = (word & ~lanes) | (value & lanes);
}

template <class T>
constexpr int kBits = std::is_same_v<T, bool> ? 1
                      : sizeof(T) == 1        ? 16
                                              : 8 * sizeof(T);

// ---- The table

using Texts = std::vector<std::string>;  // of operands

struct Form {
  std::vector<int> bits;  // of the operands: the result, then the others
  Action act = nullptr;
  // In place of `act`, for an instruction that is built in a way of its own.
  void (*build)(const Texts& texts, Operands&, Instruction*) = nullptr;
};
using Table = std::map<std::string, Form>;  // by opcode

// The action that sets the first operand to function(others...), lane by lane.
template <class F, class To, class... From>
struct Lanewise {
  static inline const F* function = nullptr;

  template <size_t... I>
  static To At(Warp& warp, const Instruction& i, int lane, std::index_sequence<I...>) {
    return (*function)(Get<From>(warp, i.operands[I + 1], lane)...);
  }
  static void Act(Warp& warp, const Instruction& i, uint32_t lanes) {
    constexpr auto kIndices = std::index_sequence_for<From...>();
    if constexpr (std::is_same_v<To, bool>) {
      uint32_t result = 0;
      for (int lane = 0; lane < kLanes; ++lane)
        result |= static_cast<uint32_t>(At(warp, i, lane, kIndices)) << lane;
      SetPredicate(warp, i.operands[0], lanes, result);
    } else if (lanes == kAll) {
      Stored<To>* const to = StoredAt<To>(warp, i.operands[0]);
      for (int lane = 0; lane < kLanes; ++lane)
        to[lane] = ToStored<To>(At(warp, i, lane, kIndices));
    } else {
      for (int lane = 0; lane < kLanes; ++lane)
        if (Has(lanes, lane)) Set<To>(warp, i.operands[0], lane, At(warp, i, lane, kIndices));
    }
  }
};

template <class To, class... From, class F>
void Define(Table& table, const std::string& name, F function) {
  static_assert(std::is_class_v<F>, "pointers to different functions have one type");
  Lanewise<F, To, From...>::function = new F(function);  // for the life of the table
  table[name] = {{kBits<To>, kBits<From>...}, Lanewise<F, To, From...>::Act};
}

// An instruction with a number of operands that `build` takes.
inline void DefineBuilt(Table& table, const std::string& name, size_t count,
                        decltype(Form::build) build) {
  table[name] = {std::vector<int>(count), nullptr, build};
}

// The same of a register that is wider than the number, which is its lower part.
inline std::string OfWide(const std::string& opcode) { return opcode + " of 64 bits"; }

// A number of 16 bits in float32.
template <class T>
float Widened(uint16_t bits) {
  return Widen(T{bits});
}

// ---- The kinds

void DefineArithmetic(Table& table);   // of integers, bits, float32 and predicates
void DefineConversions(Table& table);  // among types
void DefineMemory(Table& table);       // asynchronous copies and kinds of addresses
void DefineWarp(Table& table);         // what lanes do together: shuffles, votes, matrices
// Opcodes that have too many forms for the table; they return whether they know this one. `parts` are
// those between the dots.
bool BuildAccess(const Texts& parts, const Texts& texts, Operands&, Instruction*);  // ld, st
bool BuildAtomic(const Texts& parts, const Texts& texts, Operands&, Instruction*);  // atom, red
// mov from or to "{a, b}".
void BuildPackedMove(int bits, const Texts& texts, Operands&, Instruction*);

// Bits of "u32", "f64", ...; 0 if it is no such type.
inline int TakeType(const std::string& type) {
  if (type.size() < 2 || std::string("bsuf").find(type[0]) == std::string::npos) return 0;
  const std::string bits = type.substr(1);
  return bits == "8" || bits == "16" || bits == "32" || bits == "64" ? std::atoi(bits.c_str()) : 0;
}

}  // namespace ptx
}  // namespace performer
