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
  bool overflow;
  return ElementCount(shape, &overflow);
}

// The outputs of one operator, one after another, or nothing if it failed.
std::vector<float> Run(Op op, int threads) {
  const int64_t kBatch = 2, kHeads = 4, kGroups = 2, kRows = 1100, kWidth = 16, kFeatures = 24;
  const Signature& signature = SignatureOf(op);
  Call call;
  std::vector<std::vector<float>> inputs;
  std::vector<int64_t> offsets = {0};
  for (const Argument& argument : signature.inputs) {
    Shape shape;
    for (const char* token = argument.shape; *token != '\0';) {
      const std::string text(token, std::strcspn(token, " "));
      token += text.size() + (token[text.size()] == ' ' ? 1 : 0);
      const char letter = text[0];
      shape.dims.push_back(letter == 'B' || text == "N" || text == "1|N" ? kBatch
                           : letter == 'H'                               ? kHeads
                           : letter == 'G'                               ? kGroups
                           : letter == 'L' || letter == 'S'              ? kRows
                           : letter == 'D' || letter == 'E'              ? kWidth
                           : letter == 'M'                               ? kFeatures
                                                                         : 1);
    }
    inputs.push_back(Values(Elements(shape), static_cast<int>(inputs.size())));
    call.input_shapes.push_back(shape);
    call.inputs.push_back(argument.type == ArgumentType::kOffsets
                              ? static_cast<const void*>(offsets.data())
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

}  // namespace

int main() {
  int failures = 0;
  for (const Op op : kAllOps) {
    const std::vector<float> one = Run(op, 1);
    for (const int threads : {2, 8}) {
      const std::vector<float> many = Run(op, threads);
      const bool same = !one.empty() && one.size() == many.size() &&
                        std::memcmp(one.data(), many.data(), one.size() * sizeof(float)) == 0;
      bool finite = true;
      for (const float x : many) finite &= std::isfinite(x);
      if (!same || !finite) {
        std::fprintf(stderr, "%s with %d threads: %s\n", SignatureOf(op).name, threads,
                     same ? "not finite" : "other bits");
        ++failures;
      }
    }
  }
  return failures;
}
