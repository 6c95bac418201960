// How tensor cores add. PTX leaves it open; this is what the GPUs were found to do by Khattak and
// Mikaitis, "Accurate Models of NVIDIA Tensor Cores" (arXiv:2512.07004): the products of a step and
// the accumulator are aligned to the largest exponent among them, cut off below some bits, and
// added; the sum is cut off to float32.
#pragma once

#include <string>

namespace performer {
namespace sim {

enum class TensorCores {
  kH100,  // and H200, B200: all products in one step, two bits kept below float32's last one
  kA100,  // and sm_86, sm_89: half of the products in a step, one bit kept
};

// Those of a name, H100 or A100. Throws std::invalid_argument for another one.
TensorCores ParseTensorCores(const std::string& name);

// d [16][8] += a [16][depth] b [depth][8], depth 8 or 16. `min_exponent` is that of normal numbers
// in the type of a and b. A product with a zero counts for nothing, whatever the other factor's
// exponent. Sums with an infinity or NaN are those of float32.
void AddProducts(TensorCores cores, int depth, int min_exponent, const float* a, const float* b,
                 float* d);

}  // namespace sim
}  // namespace performer
