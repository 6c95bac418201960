// Scratch memory of one kernel call, from the C allocator; no exceptions.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#include "cpu/isa.h"
#include "cpu/memory/layout.h"

PERFORMER_ISA_BEGIN

// `bytes` of memory, uninitialised, for std::free; nullptr if there is none. The allocator gives
// large blocks back to the system and gets them anew, page by page. Where the system lets
// programs ask for it, they come in huge pages, which takes a fraction of the time.
inline void* AllocateBlock(int64_t bytes) {
  constexpr int64_t kHugePage = 2 << 20, kLarge = 2 * kHugePage;
  void* block = nullptr;
  if (posix_memalign(&block, static_cast<size_t>(bytes < kLarge ? kAlignment : kHugePage),
                     static_cast<size_t>(bytes)) != 0)
    return nullptr;
#ifdef MADV_HUGEPAGE
  if (bytes >= kLarge)
    madvise(block, static_cast<size_t>(bytes / kHugePage * kHugePage), MADV_HUGEPAGE);
#endif
  return block;
}

// Hands out aligned arrays of one block:
//   Arena arena;
//   if (!arena.Allocate([&] { s.SetPointers(arena, ...); })) return false;
// where SetPointers calls Take for each of its arrays.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { std::free(block_); }

  // An array of `count` values, uninitialised.
  template <class T>
  T* Take(int64_t count) {
    char* at = block_ == nullptr ? nullptr : block_ + used_;
    used_ += RoundUp(count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return reinterpret_cast<T*>(at);
  }
  // Runs set_pointers() twice: first without a block, which measures, then with one. False if there
  // is no memory; the pointers are then not valid.
  template <class SetPointers>
  bool Allocate(SetPointers set_pointers) {
    set_pointers();
    block_ = static_cast<char*>(AllocateBlock(used_ > 0 ? used_ : kAlignment));
    if (block_ == nullptr) return false;
    used_ = 0;
    set_pointers();
    return true;
  }
  // Bytes that were taken.
  int64_t used() const { return used_; }

 private:
  char* block_ = nullptr;
  int64_t used_ = 0;
};

// An array of plain values that grows.
template <class T>
class GrowingArray {
 public:
  GrowingArray() = default;
  GrowingArray(const GrowingArray&) = delete;
  GrowingArray& operator=(const GrowingArray&) = delete;
  ~GrowingArray() { std::free(data_); }

  // Room for `count` more; nullptr if there is no memory, and then nothing has changed.
  T* Append(int64_t count) {
    if (size_ + count > capacity_) {
      const int64_t capacity = 2 * capacity_ > size_ + count ? 2 * capacity_ : size_ + count;
      void* data = std::realloc(data_, static_cast<size_t>(capacity) * sizeof(T));
      if (data == nullptr) return nullptr;
      data_ = static_cast<T*>(data);
      capacity_ = capacity;
    }
    size_ += count;
    return data_ + size_ - count;
  }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0, capacity_ = 0;
};

PERFORMER_ISA_END
