// The drivers with many threads: the results are those of one thread, bit for bit. Under
// ThreadSanitizer it also shows that no two threads touch the same memory.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "core/params.h"
#include "cpu/run.h"

using namespace performer;

namespace {

std::vector<float> Values(int64_t count, int seed) {
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; ++i)
    values[i] = std::sin(0.37f * static_cast<float>(i % 9973) + static_cast<float>(seed));
  return values;
}

cpu::Threads MakeThreads(int threads) {
  const auto parallel_for = [threads](int64_t count, int64_t,
                                      const std::function<void(int64_t, int64_t)>& body) {
    std::vector<std::thread> workers;
    for (int t = 0; t < threads; ++t)
      workers.emplace_back([&, t] { body(count * t / threads, count * (t + 1) / threads); });
    for (std::thread& worker : workers) worker.join();
  };
  return {threads, parallel_for};
}

int64_t Elements(const Shape& shape) {
  int64_t count = 1;
  for (const int64_t dim : shape.dims) count *= dim;
  return count;
}

struct Sizes {
  int64_t batch, heads, groups, rows, width, features;
};
constexpr Sizes kMany = {2, 4, 2, 1100, 16, 24};
// Fewer sequences and heads than threads, which have to share the sub-chunks of one.
constexpr Sizes kFew = {1, 2, 1, 4000, 16, 512};

// The outputs of one operator, one after another, or nothing if it failed.
std::vector<float> Run(Op op, const Sizes& sizes, bool causal, int threads) {
  const Signature& signature = SignatureOf(op);
  Call call;
  call.attributes.causal = causal;  // of near-and-far attention
  std::vector<std::vector<float>> inputs;
  std::vector<int64_t> offsets = {0};
  for (const Argument& argument : signature.inputs) {
    Shape shape;
    for (const char* token = argument.shape; *token != '\0';) {
      const std::string text(token, std::strcspn(token, " "));
      token += text.size() + (token[text.size()] == ' ' ? 1 : 0);
      const char letter = text[0];
      shape.dims.push_back(letter == 'B' || text == "N" || text == "P" ? sizes.batch
                           : letter == 'H'                             ? sizes.heads
                           : letter == 'G'                             ? sizes.groups
                           : letter == 'L' || letter == 'S'            ? sizes.rows
                           : letter == 'D' || letter == 'E'            ? sizes.width
                           : letter == 'M'                             ? sizes.features
                                                                       : 1);
    }
    inputs.push_back(Values(Elements(shape), static_cast<int>(inputs.size())));
    call.input_shapes.push_back(shape);
    const bool integers =
        argument.type == ArgumentType::kOffsets || argument.type == ArgumentType::kStart;
    call.inputs.push_back(integers ? static_cast<const void*>(offsets.data())
                                   : inputs.back().data());
  }
  std::vector<Shape> shapes;
  Status status = InferShapes(op, call.attributes, call.input_shapes, &call.dims, &shapes);
  std::vector<std::vector<float>> outputs;
  for (const Shape& shape : shapes) outputs.emplace_back(Elements(shape), NAN);
  for (auto& output : outputs) call.outputs.push_back(output.data());
  if (status.ok()) status = cpu::Run(op, call, MakeThreads(threads));
  if (!status.ok()) {
    std::fprintf(stderr, "%s: %s\n", signature.name, status.message().c_str());
    return {};
  }
  std::vector<float> all;
  for (const auto& output : outputs) all.insert(all.end(), output.begin(), output.end());
  return all;
}

// The number of times that many threads gave something else than one.
int Failures(Op op, const Sizes& sizes, bool causal = false) {
  int failures = 0;
  const std::vector<float> one = Run(op, sizes, causal, 1);
  for (const int threads : {2, 8}) {
    const std::vector<float> many = Run(op, sizes, causal, threads);
    const bool same = !one.empty() && one.size() == many.size() &&
                      std::memcmp(one.data(), many.data(), one.size() * sizeof(float)) == 0;
    bool finite = true;
    for (const float x : many) finite &= std::isfinite(x);
    if (!same || !finite) {
      std::fprintf(stderr, "%s with %d threads, batch %d: %s\n", SignatureOf(op).name, threads,
                   static_cast<int>(sizes.batch), same ? "not finite" : "other bits");
      ++failures;
    }
  }
  return failures;
}

}  // namespace

int main() {
  int failures = 0;
  for (const Op op : kAllOps) failures += Failures(op, kMany);
  for (const Op op : {Op::kNearFar, Op::kNearFarGrad}) failures += Failures(op, kMany, true);
  return failures + Failures(Op::kCausal, kFew);
}
