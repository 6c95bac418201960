// Sums over broadcast dimensions, in double and in a fixed order.
#pragma once
#include "cpu/driver/work_division.h"

namespace performer {
namespace cpu {

// The sum of blocks [rows][width], rows `stride` apart, for each of several heads.
template <class Acc>
class Totals {
 public:
  Status Start(int64_t heads, int64_t rows, int64_t width, int64_t stride) {
    heads_ = heads, rows_ = rows, width_ = width, stride_ = stride;
    PERFORMER_RETURN_IF_ERROR(Allocate(heads * rows * width, "gradient sums", &sums_));
    std::fill_n(sums_.get(), heads * rows * width, 0.0);
    return Status();
  }
  // Adds one row of a block to the sum of a head.
  void Add(int64_t head, int64_t row, const Acc* block) {
    double* sum = sums_.get() + (head * rows_ + row) * width_;
    for (int64_t i = 0; i < width_; ++i) sum[i] += static_cast<double>(block[row * stride_ + i]);
  }
  int64_t rows() const { return rows_; }
  // to [heads][rows][width] = factor * the sums.
  void Store(double factor, void* to) const {
    for (int64_t i = 0; i < heads_ * rows_ * width_; ++i)
      static_cast<Acc*>(to)[i] = static_cast<Acc>(sums_[i] * factor);
  }

 private:
  int64_t heads_ = 0, rows_ = 0, width_ = 0, stride_ = 0;
  Buffer<double> sums_;  // [heads][rows][width]
};

// Gradient of key_bias [1|B, 1|G, 1|S] from that of the log weights [B, G, S].
template <class Acc>
void ReduceKeyBias(const Dims& dims, const KeySide& keys, const Acc* full, void* to) {
  Acc* out = static_cast<Acc*>(to);
  const auto all = [](int64_t given, int64_t size) {
    return given == size ? std::pair(size, int64_t{1}) : std::pair(int64_t{1}, size);
  };
  const auto [batches, sum_batches] = all(keys.bias_batch, dims.batch);
  const auto [groups, sum_groups] = all(keys.bias_heads, dims.groups);
  const auto [rows, sum_rows] = all(keys.bias_length, dims.keys);
  for (int64_t b = 0; b < batches; ++b)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t s = 0; s < rows; ++s) {
        double sum = 0;
        for (int64_t i = 0; i < sum_batches; ++i)
          for (int64_t j = 0; j < sum_groups; ++j)
            for (int64_t k = 0; k < sum_rows; ++k)
              sum += static_cast<double>(full[((b + i) * dims.groups + g + j) * dims.keys + s + k]);
        out[(b * groups + g) * rows + s] = static_cast<Acc>(sum);
      }
}

}  // namespace cpu
}  // namespace performer
