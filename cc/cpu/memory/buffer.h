// Memory of the drivers, with errors that say what it was for.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>

#include "core/status.h"
#include "cpu/memory/layout.h"

namespace performer {
namespace cpu {

// The error of a kernel that returned false.
inline Status NoScratch() { return Status::ResourceExhausted("out of memory for scratch rows"); }

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], FreeDeleter>;

// `count` uninitialised values, aligned to a cache line.
template <class T>
Status Allocate(int64_t count, const char* purpose, Buffer<T>* buffer) {
  int64_t bytes;
  void* block = nullptr;
  if (__builtin_mul_overflow(count, static_cast<int64_t>(sizeof(T)), &bytes) ||
      posix_memalign(&block, kAlignment, static_cast<size_t>(bytes > 0 ? bytes : 1)) != 0)
    return Status::ResourceExhausted("out of memory: " + std::to_string(count) + " values for " +
                                     purpose);
  buffer->reset(static_cast<T*>(block));
  return Status();
}

}  // namespace cpu
}  // namespace performer
