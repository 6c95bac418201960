// PTX as nvcc writes it, read into kernels: instructions whose operands are places among the
// registers of a warp. machine.h runs them.
#pragma once
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace performer {
namespace ptx {

// What a program, or a kernel that runs, does wrong; it names the instruction.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Warp;
struct Instruction;
// What an instruction does for the lanes of a mask.
using Action = void (*)(Warp&, const Instruction&, uint32_t lanes);

enum class Kind : uint8_t {
  kPlain,
  kBranch,      // to `target`
  kExit,        // of a thread
  kBarrier,     // of the block
  kCollective,  // waits for the lanes of its mask, then acts once for all of them
};

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kParam };

// Where the lanes' values of an operand begin, in words of the warp's registers: 32 words for
// values of up to 32 bits, 64 for those of 64, and one word with a bit for each lane for predicates.
using Place = uint32_t;
inline constexpr Place kNone = ~0u;

// [register + offset]
struct Address {
  Place base = kNone;
  bool wide = false;  // the register has 64 bits
  int64_t offset = 0;
};

struct Instruction {
  Action act = nullptr;
  Kind kind = Kind::kPlain;
  Place guard = kNone;
  bool negated = false;  // the guard
  Space space = Space::kGeneric;
  uint8_t bytes = 0, count = 0;  // of a number in memory, and how many there are
  bool wide = false;             // the registers of those have 64 bits
  Place operands[14] = {};       // results first
  Address addresses[2];
  Place members = kNone;  // the mask of a collective; kNone: all lanes
  uint32_t target = 0;    // index of an instruction
  int64_t number = 0;
  uint32_t line = 0;  // index of its text
};

// A place that never changes: a number, an address, or what %tid.x and the like give each lane.
struct Constant {
  Place place;
  int bits;
  std::string special;  // "" for a number
  uint64_t value;
};

struct Kernel {
  std::string name;  // mangled
  std::vector<Instruction> code;
  std::vector<std::string> lines;  // texts of instructions
  std::vector<Constant> constants;
  uint32_t words = 0;  // of a warp's registers
  uint32_t param_bytes = 0, local_bytes = 0;
  unsigned max_threads = 1024;
  std::vector<uint8_t> ran;  // by instruction: whether it has acted
};

// The kernels of one or more PTX files, by mangled name. A kernel that stands there several times
// must be the same each time.
using Program = std::map<std::string, Kernel>;
Program ParseProgram(const std::string& text);

// ---- For the table of instructions (instructions/)

// Makes the operands of one instruction out of their texts.
class Operands {
 public:
  virtual ~Operands() = default;
  // Of a register with that many bits (1: a predicate), a number or a symbol's address.
  virtual Place Source(const std::string& text, int bits) = 0;
  virtual Place Result(const std::string& text, int bits) = 0;
  // Bits of the register; 0 if it is none.
  virtual int BitsOf(const std::string& text) const = 0;
  virtual Address AddressOf(const std::string& text) = 0;
  virtual uint32_t Target(const std::string& label) = 0;
};

// Fills in what an opcode does and its operands; throws Error for one that is not known.
void BuildInstruction(const std::string& opcode, const std::vector<std::string>& texts,
                      Operands& operands, Instruction* instruction);

// Parts of "{a, b}", or the text itself.
std::vector<std::string> Parts(const std::string& text);

}  // namespace ptx
}  // namespace performer
