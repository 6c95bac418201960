// The memory of the GPU: buffers on the host. Kernels may touch nothing else.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace performer {
namespace ptx {

class GlobalMemory {
 public:
  // New buffers hold NaN. `writable`: by kernels.
  void* Allocate(size_t bytes, bool writable);
  // A read-only copy.
  void* Copy(const void* data, size_t bytes);
  // Where `bytes` bytes lie; throws Error if they are in no buffer, or not to be written.
  unsigned char* Locate(uint64_t address, size_t bytes, bool write);

 private:
  struct Buffer {
    std::unique_ptr<unsigned char[]> block;
    uint64_t begin;  // aligned to 256 bytes
    size_t bytes;
    bool writable;
  };
  std::vector<Buffer> buffers_;
  size_t last_ = 0;  // where the last address lay
};

// The one that kernels run on, or nullptr.
GlobalMemory*& TheMemory();

}  // namespace ptx
}  // namespace performer
