// Calls whose work items no machine can list: each ends with ResourceExhausted, before it touches a
// tensor, and not with an exception, which TensorFlow could not catch.
#include <cstdio>
#include <vector>

#include "core/params.h"
#include "cpu/run.h"

using namespace performer;

// A sanitizer's allocator refuses sizes like these as the C library does, and goes on.
#define SANITIZER_CALLS extern "C" __attribute__((visibility("default")))
SANITIZER_CALLS const char* __asan_default_options() { return "allocator_may_return_null=1"; }
SANITIZER_CALLS const char* __tsan_default_options() { return "allocator_may_return_null=1"; }

namespace {

constexpr int64_t kSequences = int64_t{1} << 50;

int64_t Size(char letter, int64_t rows) {
  if (letter == 'B' || letter == 'N') return kSequences;
  return letter == 'L' || letter == 'S' ? rows : 1;
}

// Tensors without memory: nothing may be read or written.
Status Run(Op op, int64_t rows) {
  Call call;
  std::vector<std::vector<float>> small;  // projections, which are read first
  for (const Argument& argument : SignatureOf(op).inputs) {
    const std::string pattern = argument.shape;
    Shape shape;
    for (size_t i = 0; i < pattern.size(); i = pattern.find(' ', i) + 1) {
      shape.dims.push_back(pattern.compare(i, 3, "N+1") == 0 ? 1 : Size(pattern[i], rows));
      if (pattern.find(' ', i) == std::string::npos) break;
    }
    call.input_shapes.push_back(shape);
    bool fits = true;
    for (const int64_t dim : shape.dims) fits &= dim <= 1;
    small.emplace_back(1, 1.f);
    static const int64_t kNowhere = 0;  // the start
    call.inputs.push_back(argument.type == ArgumentType::kStart
                              ? static_cast<const void*>(&kNowhere)
                          : fits ? small.back().data()
                                 : nullptr);
  }
  std::vector<Shape> outputs;
  PERFORMER_RETURN_IF_ERROR(
      InferShapes(op, call.attributes, call.input_shapes, &call.dims, &outputs));
  call.outputs.resize(outputs.size(), nullptr);
  const auto parallel_for = [](int64_t count, int64_t,
                               const std::function<void(int64_t, int64_t)>& body) {
    if (count > 0) body(0, count);
  };
  return cpu::Run(op, call, {1, parallel_for});
}

}  // namespace

int main() {
  int failures = 0;
  const auto expect = [&](Op op, int64_t rows, Code code) {
    const Status status = Run(op, rows);
    if (status.code() == code) return;
    std::fprintf(stderr, "%s, rows of a sequence %d: code %d, \"%s\"\n", SignatureOf(op).name,
                 static_cast<int>(rows), static_cast<int>(status.code()), status.message().c_str());
    ++failures;
  };
  for (const Op op : kAllOps) expect(op, 1, Code::kResourceExhausted);
  // Without keys every sequence still has a state to write; without queries there is nothing to do.
  for (const Op op : {Op::kSummarize, Op::kCausal, Op::kNearFar, Op::kSummarizeGrad,
                      Op::kCausalGrad, Op::kNearFarGrad})
    expect(op, 0, Code::kResourceExhausted);
  expect(Op::kRead, 0, Code::kOk);
  return failures;
}
