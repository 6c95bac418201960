// Finds what an instruction does, and makes its operands.
#include "ptx/instructions/table.h"

namespace performer {
namespace ptx {
namespace {

Texts SplitAtDots(const std::string& opcode) {
  Texts parts(1);
  for (const char c : opcode)
    if (c == '.') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  return parts;
}

void DefineControl(Table& t) {
  for (const char* name : {"bra", "bra.uni"})
    DefineBuilt(t, name, 1, [](const Texts& texts, Operands& operands, Instruction* i) {
      i->kind = Kind::kBranch;
      i->target = operands.Target(texts[0]);
    });
  DefineBuilt(t, "ret", 0, [](const Texts&, Operands&, Instruction* i) { i->kind = Kind::kExit; });
  DefineBuilt(t, "bar.sync", 1, [](const Texts& texts, Operands&, Instruction* i) {
    if (texts[0] != "0") throw Error("only barrier 0 is known");
    i->kind = Kind::kBarrier;
  });
}

Table MakeTable() {
  Table table;
  DefineArithmetic(table);
  DefineConversions(table);
  DefineMemory(table);
  DefineWarp(table);
  DefineControl(table);
  return table;
}

}  // namespace

void BuildInstruction(const std::string& opcode, const Texts& texts, Operands& operands,
                      Instruction* instruction) {
  static const Table table = MakeTable();
  const Texts parts = SplitAtDots(opcode);
  const bool braces = texts.size() == 2 && (texts[0].front() == '{' || texts[1].front() == '{');
  if (parts[0] == "ld" || parts[0] == "st") {
    if (BuildAccess(parts, texts, operands, instruction)) return;
  } else if (parts[0] == "atom" || parts[0] == "red") {
    if (BuildAtomic(parts, texts, operands, instruction)) return;
  } else if (braces && (opcode == "mov.b32" || opcode == "mov.b64")) {
    return BuildPackedMove(TakeType(parts[1]), texts, operands, instruction);
  }
  const bool of_wide =
      parts[0] == "cvt" && operands.BitsOf(texts.back()) == 64 && table.count(OfWide(opcode)) != 0;
  const auto found = table.find(of_wide ? OfWide(opcode) : opcode);
  if (found == table.end()) throw Error("instruction " + opcode + " is not known");
  const Form& form = found->second;
  if (texts.size() != form.bits.size())
    throw Error(opcode + " takes " + std::to_string(form.bits.size()) + " operands");
  if (form.build != nullptr) return form.build(texts, operands, instruction);
  instruction->act = form.act;
  for (size_t n = 0; n < texts.size(); ++n)
    instruction->operands[n] =
        n == 0 ? operands.Result(texts[n], form.bits[n]) : operands.Source(texts[n], form.bits[n]);
}

}  // namespace ptx
}  // namespace performer
