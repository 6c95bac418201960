#include "ptx/program.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>
#include <utility>

#include "ptx/machine.h"

namespace performer {
namespace ptx {
namespace {

std::string Trimmed(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\r");
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(" \t\r") - first + 1);
}

// At commas outside of brackets.
std::vector<std::string> SplitOperands(const std::string& text) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (const char c : text) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == ',' && depth == 0) {
      parts.push_back(Trimmed(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!Trimmed(part).empty()) parts.push_back(Trimmed(part));
  return parts;
}

bool StartsWith(const std::string& text, const char* start) { return text.rfind(start, 0) == 0; }

// The number at the end of ".param .align 8 .b8 name[128]", or the bytes of one such type.
uint32_t BytesOf(const std::string& declaration) {
  const size_t type = declaration.find_last_of('.');
  size_t end = type + 2;
  while (end < declaration.size() && isdigit(declaration[end])) ++end;
  const auto bits = static_cast<uint32_t>(std::atoi(declaration.c_str() + type + 2));
  const size_t bracket = declaration.find('[', end);
  const uint32_t count = bracket == std::string::npos
                             ? 1
                             : static_cast<uint32_t>(std::atoi(declaration.c_str() + bracket + 1));
  return bits / 8 * count;
}

class KernelParser : public Operands {
 public:
  explicit KernelParser(std::string name) { kernel_.name = std::move(name); }

  // A line of the declaration, before "{".
  void Declare(const std::string& line) {
    if (StartsWith(line, ".maxntid")) {
      kernel_.max_threads = static_cast<unsigned>(std::atoi(line.c_str() + 8));
    } else if (StartsWith(line, ".param")) {
      if (kernel_.param_bytes != 0) Fail("more than one parameter");
      kernel_.param_bytes = BytesOf(line);
      const size_t end = std::min(line.find('['), line.size());
      const size_t begin = line.find_last_of(" \t", end) + 1;
      symbols_[line.substr(begin, end - begin)] = kParamBase;
    }
  }

  // A statement of the body, without its ";".
  void Add(const std::string& statement) {
    statement_ = statement;
    if (StartsWith(statement, ".reg")) {
      DeclareRegisters(statement);
    } else if (StartsWith(statement, ".local")) {
      if (kernel_.local_bytes != 0) Fail("more than one array in local memory");
      kernel_.local_bytes = BytesOf(statement);
      const size_t end = statement.find('[');
      const size_t begin = statement.find_last_of(" \t", end) + 1;
      symbols_[statement.substr(begin, end - begin)] = kLocalBase;
    } else if (!StartsWith(statement, ".pragma")) {
      AddInstruction(statement);
    }
  }

  void Label(const std::string& label) {
    labels_[label] = static_cast<uint32_t>(kernel_.code.size());
  }

  void DeclareShared(const std::string& name) { symbols_[name] = kSharedBase; }

  Kernel Finish() {
    for (const auto& [at, label] : branches_) {
      statement_ = kernel_.lines[kernel_.code[at].line];
      const auto found = labels_.find(label);
      if (found == labels_.end()) Fail("no label " + label);
      kernel_.code[at].target = found->second;
    }
    const Instruction* last = kernel_.code.empty() ? nullptr : &kernel_.code.back();
    if (last == nullptr || (last->kind != Kind::kExit && last->kind != Kind::kBranch) ||
        last->guard != kNone)
      throw Error("PTX: " + kernel_.name + " has an end that does not return");
    kernel_.ran.assign(kernel_.code.size(), 0);
    return std::move(kernel_);
  }

  Place Source(const std::string& text, int bits) override {
    if (StartsWith(text, "%") && registers_.count(text) != 0) return RegisterPlace(text, bits);
    if (StartsWith(text, "%")) return ConstantPlace(text, bits, 0);
    const auto symbol = symbols_.find(text);
    if (symbol != symbols_.end()) return ConstantPlace("", bits, symbol->second);
    const bool single = StartsWith(text, "0f"), wide = StartsWith(text, "0d");
    if (single || wide) {
      if (bits != (single ? 32 : 64)) Fail("a number of another width: " + text);
      return ConstantPlace("", bits, std::strtoull(text.c_str() + 2, nullptr, 16));
    }
    char* end = nullptr;
    const uint64_t value = text[0] == '-'
                               ? static_cast<uint64_t>(std::strtoll(text.c_str(), &end, 0))
                               : std::strtoull(text.c_str(), &end, 0);
    if (end == text.c_str() || *end != '\0') Fail("operand " + text + " is not known");
    return ConstantPlace("", bits, bits == 1 && value != 0 ? ~uint64_t{0} : value);
  }

  Place Result(const std::string& text, int bits) override {
    if (registers_.count(text) == 0) Fail("a result must be a register, not " + text);
    return RegisterPlace(text, bits);
  }

  int BitsOf(const std::string& text) const override {
    const auto found = registers_.find(text);
    return found == registers_.end() ? 0 : found->second.second;
  }

  Address AddressOf(const std::string& text) override {
    if (text.size() < 3 || text.front() != '[' || text.back() != ']') Fail("no address: " + text);
    const std::string inside = text.substr(1, text.size() - 2);
    const size_t plus = inside.find('+');
    const std::string base = Trimmed(inside.substr(0, plus));
    Address address;
    address.wide = BitsOf(base) != 32;
    address.base = Source(base, address.wide ? 64 : 32);
    if (plus != std::string::npos)
      address.offset = std::strtoll(inside.c_str() + plus + 1, nullptr, 0);
    return address;
  }

  uint32_t Target(const std::string& label) override {
    branches_.emplace_back(kernel_.code.size(), label);
    return 0;
  }

 private:
  [[noreturn]] void Fail(const std::string& message) const {
    throw Error("PTX: " + message + " [" + statement_ + "; in " + kernel_.name + "]");
  }

  static uint32_t WordsOf(int bits) { return bits == 1 ? 1 : bits == 64 ? 64 : 32; }

  Place Reserve(int bits) {
    if (bits != 1) kernel_.words = (kernel_.words + 15) / 16 * 16;
    const Place place = kernel_.words;
    kernel_.words += WordsOf(bits);
    return place;
  }

  // ".reg .f32 %f<166>" or ".reg .b64 %SP"
  void DeclareRegisters(const std::string& statement) {
    std::istringstream words(statement);
    std::string reg, type, name;
    words >> reg >> type >> name;
    const int bits = type == ".pred" ? 1 : std::atoi(type.c_str() + 2);
    if (bits != 1 && bits != 16 && bits != 32 && bits != 64) Fail("registers of this type");
    const size_t bracket = name.find('<');
    const int count = bracket == std::string::npos ? 1 : std::atoi(name.c_str() + bracket + 1);
    for (int i = 0; i < count; ++i)
      registers_[bracket == std::string::npos ? name
                                              : name.substr(0, bracket) + std::to_string(i)] = {
          Reserve(bits), bits};
  }

  Place RegisterPlace(const std::string& text, int bits) const {
    const auto& [place, has] = registers_.at(text);
    if (has != bits)
      Fail(text + " has " + std::to_string(has) + " bits, and not " + std::to_string(bits));
    return place;
  }

  Place ConstantPlace(const std::string& special, int bits, uint64_t value) {
    const auto key = std::make_tuple(special, bits, value);
    const auto found = constants_.find(key);
    if (found != constants_.end()) return found->second;
    if (!special.empty() && !IsSpecial(special)) Fail("register " + special + " is not known");
    const Place place = Reserve(bits);
    kernel_.constants.push_back({place, bits, special, value});
    return constants_[key] = place;
  }

  void AddInstruction(const std::string& statement) {
    Instruction instruction;
    instruction.line = static_cast<uint32_t>(kernel_.lines.size());
    kernel_.lines.push_back(statement);
    std::string rest = statement;
    if (rest[0] == '@') {
      const size_t end = rest.find_first_of(" \t");
      instruction.negated = rest[1] == '!';
      const size_t begin = instruction.negated ? 2 : 1;
      instruction.guard = Source(rest.substr(begin, end - begin), 1);
      rest = Trimmed(rest.substr(end));
    }
    const size_t end = std::min(rest.find_first_of(" \t"), rest.size());
    try {
      BuildInstruction(rest.substr(0, end), SplitOperands(rest.substr(end)), *this, &instruction);
    } catch (const Error& error) {
      if (StartsWith(error.what(), "PTX: ")) throw;
      Fail(error.what());
    }
    kernel_.code.push_back(instruction);
  }

  Kernel kernel_;
  std::string statement_;
  std::map<std::string, uint64_t> symbols_;
  std::map<std::string, std::pair<Place, int>> registers_;  // with their bits
  std::map<std::tuple<std::string, int, uint64_t>, Place> constants_;
  std::map<std::string, uint32_t> labels_;
  std::vector<std::pair<size_t, std::string>> branches_;
};

// The lines of a kernel; labels hold the number of the kernel in its file, which does not count.
std::string Normal(const std::vector<std::string>& lines) {
  std::string text;
  for (std::string line : lines) {
    for (size_t at = 0; (at = line.find("$L__BB", at)) != std::string::npos;) {
      at += 6;
      line.erase(at, line.find('_', at) - at);
    }
    text += line + '\n';
  }
  return text;
}

// lines: from behind the name, without comments.
Kernel ParseKernel(const std::string& name, const std::vector<std::string>& lines,
                   const std::vector<std::string>& shared) {
  KernelParser parser(name);
  for (const std::string& symbol : shared) parser.DeclareShared(symbol);
  bool in_body = false;
  for (const std::string& line : lines) {
    if (line == "{" && !in_body) {
      in_body = true;
    } else if (!in_body) {
      parser.Declare(line);
    } else if (line.back() == ':') {
      parser.Label(line.substr(0, line.size() - 1));
    } else if (line == "}" || line == "{" || line.back() != ';') {
      throw Error("PTX: a line that is not one statement: " + line + " [in " + name + "]");
    } else {
      parser.Add(Trimmed(line.substr(0, line.size() - 1)));
    }
  }
  return parser.Finish();
}

}  // namespace

std::vector<std::string> Parts(const std::string& text) {
  if (text.empty() || text.front() != '{') return {text};
  return SplitOperands(text.substr(1, text.size() - 2));
}

Program ParseProgram(const std::string& text) {
  Program program;
  std::map<std::string, std::string> texts;
  std::vector<std::string> shared, lines;
  std::string name, line;
  std::istringstream stream(text);
  while (std::getline(stream, line)) {
    line = Trimmed(line.substr(0, line.find("//")));
    if (line.empty()) continue;
    const size_t entry = line.find(".entry ");
    if (StartsWith(line, ".extern .shared")) {
      const size_t begin = line.find_last_of(" \t") + 1;
      shared.push_back(line.substr(begin, line.find('[') - begin));
    } else if (entry != std::string::npos) {
      name = line.substr(entry + 7, line.find('(') - entry - 7);
      lines.clear();
    } else if (!name.empty() && line == "}") {
      const std::string normal = Normal(lines);
      const auto [known, is_new] = texts.emplace(name, normal);
      if (is_new) program.emplace(name, ParseKernel(name, lines, shared));
      if (known->second != normal) throw Error("PTX: there are two different kernels " + name);
      name.clear();
    } else if (!name.empty()) {
      lines.push_back(line);
    } else if (line.find(".func") != std::string::npos || StartsWith(line, ".global") ||
               StartsWith(line, ".const")) {
      throw Error("PTX: outside of kernels: " + line);
    }
  }
  return program;
}

}  // namespace ptx
}  // namespace performer
