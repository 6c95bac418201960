#include "ptx/machine.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <utility>

namespace performer {
namespace ptx {
namespace {

// A loop that does not end is an error after this many steps of a block.
constexpr uint64_t kMostSteps = uint64_t{1} << 25;

uint64_t Random(uint64_t* state) {  // xorshift64*
  *state ^= *state << 13;
  *state ^= *state >> 7;
  *state ^= *state << 17;
  return *state * 0x2545F4914F6CDD1Dull >> 16;
}

}  // namespace

class Block {
 public:
  Block(const Launch& launch, Size index, uint64_t random)
      : launch(launch), index(index), shared(launch.shared_bytes, 0xFF), random(random | 1) {
    const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
    warps.reserve(threads / kLanes);
    for (unsigned i = 0; i < threads / kLanes; ++i) warps.emplace_back(this, i);
  }

  void Run() {
    while (true) {
      Warp* const warp = Next();
      if (warp == nullptr) break;
      const uint64_t turn = TheOptions().order == Order::kRandom ? Random(&random) % 200 + 1 : 1000;
      if ((steps += warp->Run(turn)) > kMostSteps)
        throw Error("a block does not end" + warp->Where());
      OpenBarrier();
    }
    for (const Warp& warp : warps)
      if (warp.state() != Warp::State::kDone)
        throw Error("a barrier waits for warps that have ended" + warp.Where());
  }

  const Launch& launch;
  const Size index;
  std::vector<unsigned char> shared;
  std::vector<Warp> warps;
  uint64_t random, steps = 0;

 private:
  Warp* Next() {
    std::vector<Warp*> ready;
    for (Warp& warp : warps)
      if (warp.state() == Warp::State::kReady) ready.push_back(&warp);
    if (ready.empty()) return nullptr;
    if (TheOptions().order == Order::kRandom) return ready[Random(&random) % ready.size()];
    return TheOptions().order == Order::kForward ? ready.front() : ready.back();
  }

  void OpenBarrier() {
    for (const Warp& warp : warps)
      if (warp.state() != Warp::State::kAtBarrier) return;
    for (Warp& warp : warps) warp.LeaveBarrier();
  }
};

namespace {

using Value = std::function<unsigned(const Block&, unsigned thread)>;
const std::map<std::string, Value>& Specials() {
  static const std::map<std::string, Value> specials = [] {
    std::map<std::string, Value> table;
    const std::pair<const char*, unsigned Size::*> axes[] = {
        {".x", &Size::x}, {".y", &Size::y}, {".z", &Size::z}};
    for (const auto& [name, axis] : axes) {
      const auto part = axis;
      table[std::string("%ctaid") + name] = [=](const Block& b, unsigned) { return b.index.*part; };
      table[std::string("%nctaid") + name] = [=](const Block& b, unsigned) {
        return b.launch.grid.*part;
      };
      table[std::string("%ntid") + name] = [=](const Block& b, unsigned) {
        return b.launch.block.*part;
      };
    }
    table["%tid.x"] = [](const Block& b, unsigned t) { return t % b.launch.block.x; };
    table["%tid.y"] = [](const Block& b, unsigned t) {
      return t / b.launch.block.x % b.launch.block.y;
    };
    table["%tid.z"] = [](const Block& b, unsigned t) {
      return t / b.launch.block.x / b.launch.block.y;
    };
    table["%laneid"] = [](const Block&, unsigned t) { return t % kLanes; };
    return table;
  }();
  return specials;
}

}  // namespace

bool IsSpecial(const std::string& name) { return Specials().count(name) != 0; }

Options& TheOptions() {
  static Options options;
  return options;
}

Warp::Warp(Block* block, unsigned index)
    : block_(block),
      index_(index),
      now_{0, kAll, false},
      registers_(block->launch.kernel->words, kAll),
      local_(size_t{block->launch.kernel->local_bytes} * kLanes, 0xFF) {
  for (const Constant& constant : block->launch.kernel->constants)
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      const uint64_t value = constant.special.empty()
                                 ? constant.value
                                 : Specials().at(constant.special)(*block, index * kLanes + lane);
      if (constant.bits == 64) {
        Doubles(constant.place)[lane] = value;
      } else {
        Words(constant.place)[constant.bits == 1 ? 0 : lane] = static_cast<uint32_t>(value);
      }
    }
}

std::string Warp::Where() const {
  const Kernel& kernel = *block_->launch.kernel;
  const Size& at = block_->index;
  return " [" + kernel.lines[kernel.code[now_.at].line] + "; in " + kernel.name + ", block " +
         std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) + " warp " +
         std::to_string(index_) + "]";
}

uint64_t Warp::Run(uint64_t most) {
  Kernel& kernel = *block_->launch.kernel;
  uint64_t steps = 0;
  try {
    for (; steps < most && state_ == State::kReady; ++steps) {
      if (!others_.empty()) Choose();
      const Instruction& instruction = kernel.code[now_.at];
      uint32_t lanes = now_.lanes;
      if (instruction.guard != kNone)
        lanes &= *Words(instruction.guard) ^ (instruction.negated ? kAll : 0u);
      if (lanes == 0) {
        ++now_.at;
        continue;
      }
      switch (instruction.kind) {
        case Kind::kPlain:
          instruction.act(*this, instruction, lanes);
          ++now_.at;
          break;
        case Kind::kBranch:
          Part(instruction.target, lanes);
          break;
        case Kind::kExit:
          Exit(lanes);
          break;
        case Kind::kCollective:
        case Kind::kBarrier:
          if (lanes != MembersOf(instruction, lanes)) {
            // Those of them that are elsewhere, or come here by another way.
            if (lanes != now_.lanes) throw Error("lanes of a warp pass by what waits for them");
            now_.waits = true;
            Choose();
            continue;
          }
          if (instruction.kind == Kind::kBarrier) {
            state_ = State::kAtBarrier;
          } else {
            instruction.act(*this, instruction, lanes);
          }
          ++now_.at;
          break;
      }
      kernel.ran[static_cast<size_t>(&instruction - kernel.code.data())] = 1;
    }
  } catch (const Error& error) {
    throw Error(error.what() + Where());
  }
  return steps;
}

uint32_t Warp::MembersOf(const Instruction& instruction, uint32_t lanes) {
  if (instruction.members == kNone) return kAll;
  const uint32_t* const masks = Words(instruction.members);
  const int first = __builtin_ctz(lanes);
  for (int lane = 0; lane < kLanes; ++lane)
    if ((lanes >> lane & 1) != 0 && masks[lane] != masks[first])
      throw Error("lanes wait for each other with different masks");
  if ((lanes & ~masks[first]) != 0) throw Error("a lane is not in its own mask");
  return masks[first];
}

void Warp::Part(uint32_t target, uint32_t taken) {
  const uint32_t rest = now_.lanes & ~taken;
  if (rest != 0) others_.push_back({now_.at + 1, rest, false});
  now_ = {target, taken, false};
}

void Warp::Exit(uint32_t lanes) {
  for (int lane = 0; lane < kLanes; ++lane)
    if ((lanes >> lane & 1) != 0 && !(copies_[lane].open.empty() && copies_[lane].groups.empty()))
      throw Error("a thread ends with asynchronous copies in flight");
  now_.lanes &= ~lanes;
  if (now_.lanes != 0) {
    ++now_.at;
  } else if (others_.empty()) {
    state_ = State::kDone;
  } else {
    now_ = others_.back();
    others_.pop_back();
  }
}

void Warp::Choose() {
  others_.push_back(now_);
  std::sort(others_.begin(), others_.end(),
            [](const Group& a, const Group& b) { return a.at < b.at; });
  size_t kept = 0;
  for (size_t i = 1; i < others_.size(); ++i) {
    if (others_[i].at == others_[kept].at) {
      others_[kept].lanes |= others_[i].lanes;
      others_[kept].waits = false;  // perhaps these are all
    } else {
      others_[++kept] = others_[i];
    }
  }
  others_.resize(kept + 1);
  const auto chosen =
      std::find_if(others_.begin(), others_.end(), [](const Group& g) { return !g.waits; });
  if (chosen == others_.end()) throw Error("a warp waits for lanes that never come");
  now_ = *chosen;
  others_.erase(chosen);
}

uint64_t Warp::AddressIn(const Address& address, int lane) {
  const uint64_t base = address.wide ? Doubles(address.base)[lane] : Words(address.base)[lane];
  return base + static_cast<uint64_t>(address.offset);
}

unsigned char* Warp::Locate(Space space, uint64_t address, int bytes, int alignment, bool write,
                            int lane) {
  if (space == Space::kGeneric) {
    space = (address & kSharedWindow) != 0  ? Space::kShared
            : (address & kLocalWindow) != 0 ? Space::kLocal
                                            : Space::kGlobal;
    if (space != Space::kGlobal) address &= ~(kSharedWindow | kLocalWindow);
  }
  if (address % static_cast<uint64_t>(alignment) != 0)
    throw Error("an address is not aligned to " + std::to_string(alignment) + " bytes");
  const auto within = [&](const char* name, uint64_t base, size_t size) {
    if (address < base || address - base > size || size - (address - base) < size_t(bytes))
      throw Error(std::to_string(bytes) + " bytes at " +
                  std::to_string(static_cast<int64_t>(address - base)) + " lie outside of " + name +
                  " memory of " + std::to_string(size));
    return address - base;
  };
  switch (space) {
    case Space::kShared:
      return block_->shared.data() + within("shared", kSharedBase, block_->shared.size());
    case Space::kLocal: {
      const size_t size = block_->launch.kernel->local_bytes;
      return local_.data() + size * static_cast<size_t>(lane) + within("local", kLocalBase, size);
    }
    case Space::kParam:
      if (write) throw Error("a parameter is written");
      return const_cast<unsigned char*>(block_->launch.params) +
             within("parameter", kParamBase, block_->launch.kernel->param_bytes);
    default:
      return TheMemory()->Locate(address, static_cast<size_t>(bytes), write);
  }
}

void Warp::CopyAsync(int lane, uint64_t to, uint64_t from, int bytes, int valid) {
  const Copy copy = {to, from, bytes, valid};
  if (TheOptions().order == Order::kRandom && Random(&block_->random) % 4 == 0) {
    Perform(lane, copy);
  } else {
    copies_[lane].open.push_back(copy);
  }
}

void Warp::Perform(int lane, const Copy& copy) {
  unsigned char* const to = Locate(Space::kShared, copy.to, copy.bytes, copy.bytes, true, lane);
  std::memset(to, 0, static_cast<size_t>(copy.bytes));
  if (copy.from % static_cast<uint64_t>(copy.bytes) != 0)
    throw Error("a copy is not aligned to its size");
  if (copy.valid > 0)
    std::memcpy(to, Locate(Space::kGlobal, copy.from, copy.valid, 1, false, lane),
                static_cast<size_t>(copy.valid));
}

void Warp::CommitCopies(int lane) {
  copies_[lane].groups.push_back(std::move(copies_[lane].open));
  copies_[lane].open.clear();
}

void Warp::WaitForCopies(int lane, size_t groups_left) {
  auto& groups = copies_[lane].groups;
  while (groups.size() > groups_left) {
    for (const Copy& copy : groups.front()) Perform(lane, copy);
    groups.pop_front();
  }
}

void Run(const Launch& launch) {
  const Kernel& kernel = *launch.kernel;
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  if (threads % kLanes != 0 || threads > kernel.max_threads)
    throw Error(kernel.name + " is launched with blocks of " + std::to_string(threads) +
                " threads; it is made for " + std::to_string(kernel.max_threads));
  const uint64_t count = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  uint64_t random = TheOptions().seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  std::vector<uint64_t> blocks(count);
  for (uint64_t i = 0; i < count; ++i)
    blocks[i] = TheOptions().order == Order::kReverse ? count - 1 - i : i;
  if (TheOptions().order == Order::kRandom)
    for (uint64_t i = count; i > 1; --i) std::swap(blocks[i - 1], blocks[Random(&random) % i]);
  for (const uint64_t i : blocks) {
    const Size index = {static_cast<unsigned>(i % launch.grid.x),
                        static_cast<unsigned>(i / launch.grid.x % launch.grid.y),
                        static_cast<unsigned>(i / launch.grid.x / launch.grid.y)};
    Block(launch, index, Random(&random)).Run();
  }
}

}  // namespace ptx
}  // namespace performer
