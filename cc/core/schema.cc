#include "core/schema.h"

#include <cstring>
#include <sstream>

namespace performer {
namespace {

constexpr ArgumentType kT = ArgumentType::kTensor, kU = ArgumentType::kState,
                       kI = ArgumentType::kOffsets, kStart = ArgumentType::kStart;

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
      {"key_bias", kU, kCausalKeyBias},  {"initial_log_mass", kU, "1|N G M"},
      {"initial_mean", kU, "1|N G M E"}, {"offsets", kI, "N+1"}};
  const std::vector<Argument> near_far = {{"query", kT, "B L H D"},
                                          {"key", kT, "B S G D"},
                                          {"value", kT, "B S G E"},
                                          {"query_projection", kU, "1|G|H M D"},
                                          {"key_projection", kU, "1|G M D"},
                                          {"feature_bias", kU, "1|G|H M"},
                                          {"key_bias", kU, kKeyBias},
                                          {"initial_log_mass", kU, "1|N G M"},
                                          {"initial_mean", kU, "1|N G M E"},
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

std::vector<std::string> Split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

// "[B, 1|G, M]"
std::string Bracketed(const std::vector<std::string>& tokens) {
  std::string text = "[";
  for (size_t i = 0; i < tokens.size(); ++i) text += (i > 0 ? ", " : "") + tokens[i];
  return text + "]";
}

// The values of the letters, each with the argument that fixed it.
class Letters {
 public:
  // Checks one argument against its pattern, and learns the letters that stand alone in it.
  Status Match(const Argument& argument, const Shape& shape) {
    if (!shape.known_rank) return Status();
    const std::vector<std::string> tokens = Split(argument.shape, ' ');
    const std::string must = std::string(argument.name) + " must have shape " + Bracketed(tokens);
    if (shape.rank() != static_cast<int>(tokens.size()))
      return Status::InvalidArgument(must + ", rank " + std::to_string(tokens.size()) +
                                     "; got rank " + std::to_string(shape.rank()) + ", shape " +
                                     ToString(shape));
    bool overflow;
    ElementCount(shape, &overflow);
    if (overflow)
      return Status::InvalidArgument(must + " with fewer than 2**63 elements; got " +
                                     ToString(shape));
    for (size_t i = 0; i < tokens.size(); ++i) {
      const int64_t dim = shape.dims[i];
      if (dim == kUnknown) continue;
      PERFORMER_RETURN_IF_ERROR(MatchDim(argument, tokens[i], dim, must, shape));
    }
    return Status();
  }

  int64_t operator[](char letter) const { return values_[Index(letter)]; }
  void Set(char letter, int64_t value, const char* source) {
    values_[Index(letter)] = value;
    sources_[Index(letter)] = source;
  }

 private:
  static constexpr int kLetters = 26;
  static int Index(char letter) { return letter - 'A'; }

  Status MatchDim(const Argument& argument, const std::string& token, int64_t dim,
                  const std::string& must, const Shape& shape) {
    if (token == "N+1") {
      if (dim < 1)
        return Status::InvalidArgument(must + " with at least one entry; got " + ToString(shape));
      return MatchLetter(argument, 'N', dim - 1, must, shape);
    }
    const std::vector<std::string> choices = Split(token, '|');
    if (choices.size() == 1) return MatchLetter(argument, token[0], dim, must, shape);
    std::string allowed;
    for (const std::string& choice : choices) {
      const int64_t value = choice == "1" ? 1 : (*this)[choice[0]];
      if (value == kUnknown || value == dim) return Status();
      allowed += (allowed.empty() ? "" : " or ") +
                 (choice == "1" ? choice : choice + " = " + std::to_string(value));
    }
    return Status::InvalidArgument(must + " with " + token + " being " + allowed + "; got " +
                                   ToString(shape));
  }

  Status MatchLetter(const Argument& argument, char letter, int64_t dim, const std::string& must,
                     const Shape& shape) {
    const int i = Index(letter);
    if (values_[i] == kUnknown) Set(letter, dim, argument.name);
    if (values_[i] == dim) return Status();
    return Status::InvalidArgument(must + " with " + letter + " = " + std::to_string(values_[i]) +
                                   " as in " + sources_[i] + "; got " + ToString(shape));
  }

  std::vector<int64_t> values_ = std::vector<int64_t>(kLetters, kUnknown);
  std::vector<const char*> sources_ = std::vector<const char*>(kLetters, "");
};

Status CheckSizes(const Letters& letters) {
  const struct {
    char letter;
    const char* meaning;
    int64_t min, max;
  } kBounds[] = {{'H', "number of query heads", 1, INT64_MAX},
                 {'G', "number of key and value heads", 1, INT64_MAX},
                 {'D', "key dimension", 1, kMaxWidth},
                 {'M', "number of features", 1, kMaxWidth},
                 {'E', "value dimension", 0, kMaxWidth}};
  for (const auto& bound : kBounds) {
    const int64_t value = letters[bound.letter];
    if (value == kUnknown || (value >= bound.min && value <= bound.max)) continue;
    std::string rule = "at least " + std::to_string(bound.min);
    if (bound.max != INT64_MAX) rule += " and at most " + std::to_string(bound.max);
    return Status::InvalidArgument(std::string("the ") + bound.meaning + " " + bound.letter +
                                   " must be " + rule + "; got " + std::to_string(value));
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
  for (const std::string& token : Split(output.shape, ' ')) shape.dims.push_back(letters[token[0]]);
  return shape;
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
  // Two passes, as a broadcast dimension may come before the argument that fixes its letter.
  for (int pass = 0; pass < 2; ++pass) {
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
  for (const Argument& output : signature.outputs) {
    outputs->push_back(OutputShape(output, signature, inputs, letters));
    bool overflow;
    ElementCount(outputs->back(), &overflow);
    if (overflow)
      return Status::InvalidArgument(std::string("the output ") + output.name +
                                     " must have fewer than 2**63 elements; its shape would be " +
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
