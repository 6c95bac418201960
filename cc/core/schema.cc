#include "core/schema.h"

#include <array>
#include <cstring>

namespace performer {
namespace {

constexpr ArgumentType kT = ArgumentType::kTensor, kU = ArgumentType::kState,
                       kI = ArgumentType::kOffsets, kStart = ArgumentType::kStart;

// What IsTooLarge (shape.h) asks of a tensor.
const char kSizeRule[] = " of at most 2**56 elements, where an axis of 0 counts as 1";
static_assert(kMaxElements == int64_t{1} << 56);

const char kKeyBias[] = "1|B 1|G 1|S", kCausalKeyBias[] = "1|B 1|G 1|L";

std::vector<Signature> MakeSignatures() {
  const std::vector<Argument> summarize = {{"key", kT, "B S G D"},
                                           {"value", kT, "B S G E"},
                                           {"key_projection", kU, "1|G M D"},
                                           {"key_bias", kU, kKeyBias},
                                           {"offsets", kI, "N+1"}};
  const std::vector<Argument> read = {
      {"query", kT, "B L H D"},        {"query_projection", kU, "1|G|H M D"},
      {"feature_bias", kU, "1|G|H M"}, {"log_mass", kU, "N G M"},
      {"mean", kU, "N G M E"},         {"offsets", kI, "N+1"}};
  const std::vector<Argument> causal = {
      {"query", kT, "B L H D"},          {"key", kT, "B L G D"},
      {"value", kT, "B L G E"},          {"query_projection", kU, "1|G|H M D"},
      {"key_projection", kU, "1|G M D"}, {"feature_bias", kU, "1|G|H M"},
      {"key_bias", kU, kCausalKeyBias},  {"initial_log_mass", kU, "P G M"},
      {"initial_mean", kU, "P G M E"},   {"offsets", kI, "N+1"}};
  const std::vector<Argument> near_far = {{"query", kT, "B L H D"},
                                          {"key", kT, "B S G D"},
                                          {"value", kT, "B S G E"},
                                          {"query_projection", kU, "1|G|H M D"},
                                          {"key_projection", kU, "1|G M D"},
                                          {"feature_bias", kU, "1|G|H M"},
                                          {"key_bias", kU, kKeyBias},
                                          {"initial_log_mass", kU, "P G M"},
                                          {"initial_mean", kU, "P G M E"},
                                          {"offsets", kI, "N+1"},
                                          {"start", kStart, ""}};
  const std::vector<Argument> state = {{"log_mass", kU, "N G M"}, {"mean", kU, "N G M E"}};
  const std::vector<Argument> grad_state = {{"grad_log_mass", kU, "N G M"},
                                            {"grad_mean", kU, "N G M E"}};
  const std::vector<Argument> out = {{"out", kT, "B L H E"}},
                              grad_out = {{"grad_out", kT, "B L H E"}},
                              log_weight = {{"log_weight", kU, "B L H"}},
                              grad_log_weight = {{"grad_log_weight", kU, "B L H"}};
  const auto join = [](std::vector<Argument> all,
                       std::initializer_list<std::vector<Argument>> more) {
    for (const auto& arguments : more) all.insert(all.end(), arguments.begin(), arguments.end());
    return all;
  };
  return {
      {"Performer>Summarize", summarize, state},
      {"Performer>Read", read, out},
      {"Performer>Causal", causal, join(out, {state})},
      {"Performer>NearFar", near_far, join(out, {log_weight, state})},
      {"Performer>SummarizeGrad",
       join(summarize, {state, grad_state}),
       {{"grad_key", kT, "=key"},
        {"grad_value", kT, "=value"},
        {"grad_key_projection", kU, "=key_projection"},
        {"grad_key_bias", kU, "=key_bias"}}},
      {"Performer>ReadGrad",
       join(read, {out, grad_out}),
       {{"grad_query", kT, "=query"},
        {"grad_query_projection", kU, "=query_projection"},
        {"grad_feature_bias", kU, "=feature_bias"},
        {"grad_log_mass", kU, "=log_mass"},
        {"grad_mean", kU, "=mean"}}},
      {"Performer>CausalGrad",
       join(causal, {out, state, grad_out, grad_state}),
       {{"grad_query", kT, "=query"},
        {"grad_key", kT, "=key"},
        {"grad_value", kT, "=value"},
        {"grad_query_projection", kU, "=query_projection"},
        {"grad_key_projection", kU, "=key_projection"},
        {"grad_feature_bias", kU, "=feature_bias"},
        {"grad_key_bias", kU, "=key_bias"},
        {"grad_initial_log_mass", kU, "=initial_log_mass"},
        {"grad_initial_mean", kU, "=initial_mean"}}},
      {"Performer>NearFarGrad",
       join(near_far, {out, log_weight, state, grad_out, grad_log_weight, grad_state}),
       {{"grad_query", kT, "=query"},
        {"grad_key", kT, "=key"},
        {"grad_value", kT, "=value"},
        {"grad_query_projection", kU, "=query_projection"},
        {"grad_key_projection", kU, "=key_projection"},
        {"grad_feature_bias", kU, "=feature_bias"},
        {"grad_key_bias", kU, "=key_bias"},
        {"grad_initial_log_mass", kU, "=initial_log_mass"},
        {"grad_initial_mean", kU, "=initial_mean"}}},
  };
}

// A dimension in the shape of an argument: a letter, "N+1", or choices such as "1|G|H".
class Token {
 public:
  explicit Token(const char* at) : at_(at), size_(0) {
    while (at[size_] != ' ' && at[size_] != '\0') ++size_;
  }

  bool is_last() const { return at_[size_] == '\0'; }
  Token next() const { return Token(at_ + size_ + 1); }
  std::string text() const { return std::string(at_, size_); }
  bool has_choices() const { return size_ > 1 && at_[1] == '|'; }
  size_t choices() const { return (size_ + 1) / 2; }
  char choice(size_t i) const { return at_[2 * i]; }  // a letter, or '1'
  char letter() const { return at_[0]; }
  int64_t more() const { return size_ > 1 && at_[1] == '+' ? 1 : 0; }  // than the letter

 private:
  const char* at_;
  size_t size_;
};

int RankOf(const Argument& argument) {
  int rank = argument.shape[0] == '\0' ? 0 : 1;
  for (const char* at = argument.shape; *at != '\0'; ++at) rank += *at == ' ';
  return rank;
}

// "key_bias must have shape [1|B, 1|G, 1|S]"
std::string Must(const Argument& argument) {
  std::string shape = argument.shape;
  for (size_t i = 0; (i = shape.find(' ', i)) != std::string::npos; i += 2)
    shape.replace(i, 1, ", ");
  return std::string(argument.name) + " must have shape [" + shape + "]";
}

std::string Equals(char letter, int64_t value) {
  return std::string(1, letter) + " = " + std::to_string(value);
}

// The values of the letters, each with the argument that fixed it. Nothing here allocates memory
// unless an argument is wrong: every call of an operator passes through it.
class Letters {
 public:
  Letters() { values_.fill(kUnknown); }

  // Checks one argument against its pattern, and learns the letters that stand alone in it. Where a
  // letter that is needed is not known yet, needs_more_letters() says so from then on.
  Status Match(const Argument& argument, const Shape& shape) {
    if (!shape.known_rank) return Status();
    const int rank = RankOf(argument);
    if (shape.rank() != rank)
      return Error(argument, ", rank " + std::to_string(rank) + "; got rank " +
                                 std::to_string(shape.rank()) + ", shape " + ToString(shape));
    if (IsTooLarge(shape)) return Error(argument, kSizeRule, shape);
    if (rank == 0) return Status();
    Token token(argument.shape);
    for (int axis = 0;; token = token.next(), ++axis) {
      const int64_t dim = shape.dims[axis];
      if (dim != kUnknown && token.has_choices()) {
        if (!FitsChoices(token, dim)) return ChoicesError(argument, token, shape);
      } else if (dim != kUnknown) {
        if (!FitsLetter(argument, token, dim)) return LetterError(argument, token, dim, shape);
      }
      if (token.is_last()) return Status();
    }
  }
  bool needs_more_letters() const { return needs_more_letters_; }

  int64_t operator[](char letter) const { return values_[Index(letter)]; }
  void Set(char letter, int64_t value, const char* source) {
    values_[Index(letter)] = value;
    sources_[Index(letter)] = source;
  }

 private:
  static constexpr int kLetters = 26;
  static int Index(char letter) { return letter - 'A'; }

  static Status Error(const Argument& argument, const std::string& rule) {
    return Status::InvalidArgument(Must(argument) + rule);
  }
  static Status Error(const Argument& argument, const std::string& rule, const Shape& shape) {
    return Error(argument, rule + "; got " + ToString(shape));
  }

  bool FitsChoices(Token token, int64_t dim) {
    for (size_t i = 0; i < token.choices(); ++i) {
      const int64_t value = token.choice(i) == '1' ? 1 : (*this)[token.choice(i)];
      if (value == dim) return true;
      if (value != kUnknown) continue;
      needs_more_letters_ = true;
      return true;
    }
    return false;
  }
  Status ChoicesError(const Argument& argument, Token token, const Shape& shape) const {
    std::string allowed;
    for (size_t i = 0; i < token.choices(); ++i) {
      const char choice = token.choice(i);
      allowed += (i > 0 ? " or " : "") + (choice == '1' ? "1" : Equals(choice, (*this)[choice]));
    }
    return Error(argument, " with " + token.text() + " being " + allowed, shape);
  }

  // Whether P, which is dim, is 1 or N.
  bool FitsSequences(int64_t dim) {
    const int64_t sequences = (*this)['N'];
    if (dim == 1 || dim == sequences) return true;
    if (sequences != kUnknown) return false;
    needs_more_letters_ = true;
    return true;
  }
  bool FitsLetter(const Argument& argument, Token token, int64_t dim) {
    const char letter = token.letter();
    dim -= token.more();
    if (dim < 0 || (letter == 'P' && !FitsSequences(dim))) return false;
    if ((*this)[letter] == kUnknown) Set(letter, dim, argument.name);
    return (*this)[letter] == dim;
  }
  Status LetterError(const Argument& argument, Token token, int64_t dim, const Shape& shape) {
    const char letter = token.letter();
    if (dim < token.more()) return Error(argument, " with at least one entry", shape);
    if (letter == 'P' && !FitsSequences(dim))
      return Error(argument, " with P being 1 or " + Equals('N', (*this)['N']), shape);
    return Error(argument,
                 " with " + Equals(letter, (*this)[letter]) + " as in " + sources_[Index(letter)],
                 shape);
  }

  std::array<int64_t, kLetters> values_;
  std::array<const char*, kLetters> sources_{};
  bool needs_more_letters_ = false;
};

Status CheckSizes(const Letters& letters) {
  const struct {
    char letter;
    const char* meaning;
    int64_t min, max;
  } kBounds[] = {{'H', "number of query heads", 1, kMaxHeads},
                 {'G', "number of key and value heads", 1, kMaxHeads},
                 {'D', "key dimension", 1, kMaxWidth},
                 {'M', "number of features", 1, kMaxWidth},
                 {'E', "value dimension", 0, kMaxWidth}};
  for (const auto& bound : kBounds) {
    const int64_t value = letters[bound.letter];
    if (value == kUnknown || (value >= bound.min && value <= bound.max)) continue;
    return Status::InvalidArgument(std::string("the ") + bound.meaning + " " + bound.letter +
                                   " must be at least " + std::to_string(bound.min) +
                                   " and at most " + std::to_string(bound.max) + "; got " +
                                   std::to_string(value));
  }
  const int64_t heads = letters['H'], groups = letters['G'];
  if (heads > 0 && groups > 0 && heads % groups != 0)
    return Status::InvalidArgument(
        "the number of query heads H must be a multiple of the number of key and value heads G; "
        "got H = " +
        std::to_string(heads) + ", G = " + std::to_string(groups));
  return Status();
}

// Where near-and-far attention stands: a query row at a key row, the last one at the last one.
Status CheckRows(const Attributes& attributes, const Letters& letters) {
  const int64_t queries = letters['L'], keys = letters['S'];
  if (queries == kUnknown || keys == kUnknown || queries == keys) return Status();
  const char* rule = attributes.packed    ? "equal that of keys S where sequences are packed"
                     : !attributes.causal ? "equal that of keys S unless causal"
                     : queries > keys     ? "be at most that of keys S"
                                          : nullptr;
  if (rule == nullptr) return Status();
  return Status::InvalidArgument(std::string("the number of queries L must ") + rule +
                                 "; got L = " + std::to_string(queries) +
                                 ", S = " + std::to_string(keys));
}

Shape OutputShape(const Argument& output, const Signature& signature,
                  const std::vector<Shape>& inputs, const Letters& letters) {
  if (output.shape[0] == '=') {
    for (size_t i = 0; i < inputs.size(); ++i)
      if (std::strcmp(signature.inputs[i].name, output.shape + 1) == 0) return inputs[i];
  }
  Shape shape;
  shape.dims.reserve(4);
  for (Token token(output.shape);; token = token.next()) {
    shape.dims.push_back(letters[token.letter()]);
    if (token.is_last()) return shape;
  }
}

}  // namespace

const Signature& SignatureOf(Op op) {
  static const std::vector<Signature>& signatures = *new std::vector<Signature>(MakeSignatures());
  return signatures[static_cast<size_t>(op)];
}

size_t OffsetsIndex(Op op) {
  const std::vector<Argument>& inputs = SignatureOf(op).inputs;
  size_t index = 0;
  while (inputs[index].type != ArgumentType::kOffsets) ++index;
  return index;
}

Status InferShapes(Op op, const Attributes& attributes, const std::vector<Shape>& inputs,
                   Dims* dims, std::vector<Shape>* outputs) {
  const Signature& signature = SignatureOf(op);
  PERFORMER_RETURN_IF_ERROR(ValidateAttributes(attributes));
  Letters letters;
  const auto is_offsets = [](const Argument& argument) {
    return argument.type == ArgumentType::kOffsets;
  };
  if (attributes.packed) {
    letters.Set('B', 1, "packed sequences, whose batch size is 1");
    for (size_t i = 0; i < inputs.size(); ++i)
      if (is_offsets(signature.inputs[i]))
        PERFORMER_RETURN_IF_ERROR(letters.Match(signature.inputs[i], inputs[i]));
  }
  // A second pass where a broadcast dimension came before the argument that fixes its letter.
  for (int pass = 0; pass < 2; ++pass) {
    if (pass > 0 && !letters.needs_more_letters()) break;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (is_offsets(signature.inputs[i])) continue;
      PERFORMER_RETURN_IF_ERROR(letters.Match(signature.inputs[i], inputs[i]));
      if (!attributes.packed && letters['N'] == kUnknown && letters['B'] != kUnknown)
        letters.Set('N', letters['B'], "the batch size B");
    }
  }
  PERFORMER_RETURN_IF_ERROR(CheckSizes(letters));
  if (IsNearFar(op)) PERFORMER_RETURN_IF_ERROR(CheckRows(attributes, letters));
  outputs->clear();
  outputs->reserve(signature.outputs.size());
  for (const Argument& output : signature.outputs) {
    outputs->push_back(OutputShape(output, signature, inputs, letters));
    if (IsTooLarge(outputs->back()))
      return Status::InvalidArgument(std::string("the output ") + output.name +
                                     " must be a tensor" + kSizeRule + "; its shape would be " +
                                     ToString(outputs->back()));
  }
  const bool causal = op == Op::kCausal || op == Op::kCausalGrad;
  *dims = {
      letters['B'], letters['H'], letters['G'], letters['L'], causal ? letters['L'] : letters['S'],
      letters['D'], letters['E'], letters['M'], letters['N']};
  return Status();
}

Status ValidateStart(int64_t start, bool packed) {
  if (start == 0 || (start > 0 && !packed)) return Status();
  return Status::InvalidArgument(std::string("start must be ") +
                                 (packed ? "0 where sequences are packed" : "at least 0") +
                                 "; got " + std::to_string(start));
}

Status ValidateOffsets(const int64_t* offsets, int64_t count, int64_t rows) {
  const auto error = [&](const std::string& rule, int64_t n) {
    return Status::InvalidArgument("offsets must " + rule + "; got offsets[" + std::to_string(n) +
                                   "] = " + std::to_string(offsets[n]));
  };
  if (offsets[0] != 0) return error("start at 0", 0);
  for (int64_t n = 0; n < count; ++n)
    if (offsets[n + 1] < offsets[n])
      return error(
          "never fall, but offsets[" + std::to_string(n) + "] = " + std::to_string(offsets[n]),
          n + 1);
  if (offsets[count] != rows)
    return error("end at the number of rows, " + std::to_string(rows), count);
  return Status();
}

}  // namespace performer
