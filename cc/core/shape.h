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

// The number of elements, or kUnknown. Sets *overflow to whether the number exceeds int64.
inline int64_t ElementCount(const Shape& shape, bool* overflow) {
  *overflow = false;
  if (!shape.known_rank) return kUnknown;
  bool unknown = false;
  for (const int64_t dim : shape.dims) {
    if (dim == 0) return 0;
    unknown |= dim == kUnknown;
  }
  int64_t count = 1;
  for (const int64_t dim : shape.dims)
    if (dim != kUnknown && __builtin_mul_overflow(count, dim, &count)) {
      *overflow = true;
      return kUnknown;
    }
  return unknown ? kUnknown : count;
}

}  // namespace performer
