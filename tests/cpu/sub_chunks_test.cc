// How many sub-chunks a chunk of keys has at most: the cost of causal attention is bounded whatever
// the keys hold.
#define PERFORMER_ISA counted
#include <cstdio>
#include <vector>

#include "cpu/kernels/causal/key_chain.h"

using namespace performer;
using namespace performer::cpu;
using namespace performer::cpu::counted;

namespace {

constexpr int64_t kRows = 10 * kCausalChunk, kFeatures = 4;

// Sub-chunks of kRows keys, of which key j has the given bias.
template <class Bias>
int64_t Count(Bias bias_of) {
  CausalParams params;
  params.dims.batch = params.dims.heads = params.dims.groups = params.dims.sequences = 1;
  params.dims.key_dim = params.dims.value_dim = 1;
  params.dims.queries = params.dims.keys = kRows;
  params.dims.features = kFeatures;
  const std::vector<float> rows(kRows, 0.5f), no_mass(kFeatures, -kInf<float>), mean(kFeatures);
  std::vector<float> bias, log_mass(kFeatures), new_mean(kFeatures);
  for (int64_t j = 0; j < kRows; ++j) bias.push_back(bias_of(j));
  params.keys.key = params.keys.value = rows.data();
  params.keys.bias = bias.data();
  params.keys.projection_heads = params.keys.bias_batch = params.keys.bias_heads = 1;
  params.keys.bias_length = kRows;
  params.initial = {no_mass.data(), mean.data(), 1};
  params.state.log_mass = log_mass.data();
  params.state.mean = new_mean.data();

  const Strides strides = MakeStrides<float>(params.dims);
  const std::vector<float> projection(PackedProjection<float>::Size(strides));
  std::vector<float> key_features(kFeatures * kCausalChunk);
  KeyChain<float, float> chain(params, projection.data(), {0, 0, 0, kRows});
  Arena arena;
  float* state = nullptr;
  if (!arena.Allocate([&] {
        chain.SetPointers(arena);
        state = arena.Take<float>(SummaryPartial<float>::Size(strides));
      }))
    return -1;
  const auto before = SummaryPartial<float>::At(state, strides);
  chain.Start(0, before);
  int64_t count = 0;
  for (CausalSubChunk<float> sub_chunk; chain.Next(key_features.data(), &sub_chunk); ++count)
    chain.Add(sub_chunk, before);
  return count;
}

}  // namespace

int main() {
  int failures = 0;
  const auto expect = [&](const char* keys, int64_t count, int64_t wanted) {
    if (count == wanted) return;
    std::fprintf(stderr, "%s: %d sub-chunks, not %d\n", keys, static_cast<int>(count),
                 static_cast<int>(wanted));
    ++failures;
  };
  constexpr int64_t kChunks = kRows / kCausalChunk;
  expect("equal keys", Count([](int64_t) { return 0.f; }), kChunks);
  expect("each key outweighs all before", Count([](int64_t j) { return 31.f * j; }), 2 * kChunks);
  expect("every third key is masked",
         Count([](int64_t j) { return j % 3 == 0 ? -kInf<float> : 31.f * j; }), 2 * kChunks + 1);
  return failures;
}
