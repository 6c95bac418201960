// Converts rows of tensors to rows of Acc in scratch memory, and back. Conversions to bfloat16 and
// half round to nearest even.
#pragma once
#include "core/half.h"
#include "core/params.h"
#include "cpu/memory/layout.h"
#include "cpu/simd/vector.h"

PERFORMER_ISA_BEGIN

// One head of a tensor [rows, heads, width].
struct ConstRows {
  const void* data;  // the tensor
  DType dtype;
  int64_t heads, head, width;

  template <class T>
  PERFORMER_INLINE const T* At(int64_t row) const {
    return static_cast<const T*>(data) + (row * heads + head) * width;
  }
};
struct MutableRows {
  void* data;  // the tensor
  DType dtype;
  int64_t heads, head, width;

  template <class T>
  PERFORMER_INLINE T* At(int64_t row) const {
    return static_cast<T*>(data) + (row * heads + head) * width;
  }
};

PERFORMER_INLINE constexpr int64_t SizeOf(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Prefetches rows that will be needed soon, a few cache lines at a time, in the course of a
// product. All at once they would stall it, as a core can wait for only so many cache lines.
class Prefetcher {
 public:
  explicit Prefetcher(bool backwards = false) : backwards_(backwards) {}

  // Requests rows [row, row + n). This is only a hint: they may lie outside of the tensor.
  template <class Rows>
  void Request(const Rows& rows, int64_t row, int64_t n) {
    if (n == 0 || entries_ == kMaxRanges) return;
    const int64_t width = rows.width * SizeOf(rows.dtype), stride = rows.heads * width;
    const auto at = reinterpret_cast<uintptr_t>(rows.data) +
                    static_cast<uintptr_t>(row * stride + rows.head * width);
    entry_[entries_++] = {at, stride, width, n, 0};
    lines_ += n * ((width + kAlignment - 1) / kAlignment);
  }
  // Requests as many rows after [row, row + n), or before them if `backwards`.
  void RequestNext(const ConstRows& rows, int64_t row, int64_t n) {
    Request(rows, backwards_ ? row - n : row + n, n);
  }
  // Each of `calls` of Before() prefetches the same share. A product without terms has no calls.
  PERFORMER_INLINE void Divide(int64_t calls) {
    share_ = calls == 0 ? 0 : (lines_ + calls - 1) / calls;
  }
  PERFORMER_INLINE void Before() {
    for (int64_t i = 0; i < share_ && entries_ > 0; ++i) {
      Entry& entry = entry_[entries_ - 1];
      __builtin_prefetch(
          reinterpret_cast<const void*>(entry.at + static_cast<uintptr_t>(entry.offset)));
      --lines_;
      entry.offset += kAlignment;
      if (entry.offset < entry.bytes) continue;
      entry.offset = 0;
      entry.at += static_cast<uintptr_t>(entry.stride);
      if (--entry.rows == 0) --entries_;
    }
  }
  template <class Tile>
  PERFORMER_INLINE void After(const Tile&, int64_t, int64_t) {}

 private:
  struct Entry {
    uintptr_t at;
    int64_t stride, bytes, rows,
        offset;  // between rows, of a row; rows left, bytes done of this row
  };
  static constexpr int64_t kMaxRanges = 4;
  Entry entry_[kMaxRanges];
  int64_t entries_ = 0, lines_ = 0, share_ = 0;
  bool backwards_;
};

template <class T, class Acc>
PERFORMER_INLINE void LoadTypedRows(const ConstRows& rows, int64_t row, int64_t n,
                                    const uint8_t* skip, Acc* to, int64_t stride) {
  const int64_t from_stride = rows.heads * rows.width;
  const T* from = rows.template At<T>(row);
  for (int64_t i = 0; i < n; ++i, from += from_stride, to += stride) {
    if (skip && skip[i]) {
      for (int64_t d = 0; d < stride; ++d) to[d] = 0;
    } else {
      for (int64_t d = 0; d < rows.width; ++d) to[d] = Widen(from[d]);
      for (int64_t d = rows.width; d < stride; ++d) to[d] = 0;
    }
  }
}

// to[i][0 : stride] = rows[row + i] for n rows, with zeros behind the width. Where skip[i] is set
// the row becomes 0, whatever it holds; skip [n] may be nullptr. Requests the n rows that come
// next.
template <class Acc>
void LoadRows(const ConstRows& rows, int64_t row, int64_t n, const uint8_t* skip, Acc* to,
              int64_t stride, Prefetcher* prefetcher) {
  prefetcher->RequestNext(rows, row, n);
  if constexpr (sizeof(Acc) == sizeof(double)) {
    LoadTypedRows<double>(rows, row, n, skip, to, stride);
  } else {
    if (rows.dtype == DType::kFloat32) LoadTypedRows<float>(rows, row, n, skip, to, stride);
    if (rows.dtype == DType::kBFloat16) LoadTypedRows<BFloat16>(rows, row, n, skip, to, stride);
    if (rows.dtype == DType::kHalf) LoadTypedRows<Half>(rows, row, n, skip, to, stride);
  }
}

template <class T, class Acc>
PERFORMER_INLINE void StoreTypedRows(const MutableRows& rows, int64_t row, int64_t n,
                                     const Acc* from, int64_t stride) {
  const int64_t to_stride = rows.heads * rows.width;
  T* to = rows.template At<T>(row);
  for (int64_t i = 0; i < n; ++i, to += to_stride, from += stride)
    for (int64_t d = 0; d < rows.width; ++d) Narrow(from[d], to + d);
}

// rows[row + i] = from[i][0 : width] for n rows.
template <class Acc>
void StoreRows(const MutableRows& rows, int64_t row, int64_t n, const Acc* from, int64_t stride) {
  if constexpr (sizeof(Acc) == sizeof(double)) {
    StoreTypedRows<double>(rows, row, n, from, stride);
  } else {
    if (rows.dtype == DType::kFloat32) StoreTypedRows<float>(rows, row, n, from, stride);
    if (rows.dtype == DType::kBFloat16) StoreTypedRows<BFloat16>(rows, row, n, from, stride);
    if (rows.dtype == DType::kHalf) StoreTypedRows<Half>(rows, row, n, from, stride);
  }
}

// The type in which Acc lies in a tensor.
template <class Acc>
constexpr DType kOwnType = sizeof(Acc) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;

// x rounded to dtype.
template <class Acc>
PERFORMER_INLINE Acc RoundTo(DType dtype, Acc x) {
  if constexpr (sizeof(Acc) == sizeof(float)) {
    if (dtype == DType::kBFloat16) {
      BFloat16 narrow;
      Narrow(x, &narrow);
      return Widen(narrow);
    }
    if (dtype == DType::kHalf) {
      Half narrow;
      Narrow(x, &narrow);
      return Widen(narrow);
    }
  }
  return x;
}

PERFORMER_ISA_END
