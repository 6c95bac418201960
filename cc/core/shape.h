// The shape of a tensor. Dimensions, or even the rank, may be unknown, as while a graph is traced.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace performer {

inline constexpr int64_t kUnknown = -1;

struct Shape {
  bool known_rank = true;
  std::vector<int64_t> dims;  // kUnknown where a dimension is unknown; empty if the rank is

  static Shape UnknownRank() { return {false, {}}; }
  int rank() const { return static_cast<int>(dims.size()); }
};

// "[2, ?, 4]", or "<unknown rank>".
inline std::string ToString(const Shape& shape) {
  if (!shape.known_rank) return "<unknown rank>";
  std::string text = "[";
  for (size_t i = 0; i < shape.dims.size(); ++i) {
    if (i > 0) text += ", ";
    text += shape.dims[i] == kUnknown ? "?" : std::to_string(shape.dims[i]);
  }
  return text + "]";
}

// The most elements that a tensor may have: more than any machine has memory for.
inline constexpr int64_t kMaxElements = int64_t{1} << 56;

// Whether the known dimensions multiply to more than kMaxElements. A dimension of 0 counts as 1: an
// empty tensor says nothing of its other dimensions, whose products are sizes of other buffers.
inline bool IsTooLarge(const Shape& shape) {
  int64_t count = 1;
  for (const int64_t dim : shape.dims)
    if (dim > 0 && (__builtin_mul_overflow(count, dim, &count) || count > kMaxElements))
      return true;
  return false;
}

}  // namespace performer
