#include "ptx/memory.h"

#include <cstring>
#include <string>
#include <utility>

#include "ptx/program.h"

namespace performer {
namespace ptx {

void* GlobalMemory::Allocate(size_t bytes, bool writable) {
  constexpr size_t kAlignment = 256;
  Buffer buffer;
  buffer.block = std::make_unique<unsigned char[]>(bytes + kAlignment);
  const auto address = reinterpret_cast<uint64_t>(buffer.block.get());
  buffer.begin = (address + kAlignment - 1) / kAlignment * kAlignment;
  buffer.bytes = bytes;
  buffer.writable = writable;
  void* const begin = reinterpret_cast<void*>(buffer.begin);
  std::memset(begin, 0xFF, bytes);
  buffers_.push_back(std::move(buffer));
  return begin;
}

void* GlobalMemory::Copy(const void* data, size_t bytes) {
  void* const copy = Allocate(bytes, false);
  if (bytes > 0) std::memcpy(copy, data, bytes);
  return copy;
}

unsigned char* GlobalMemory::Locate(uint64_t address, size_t bytes, bool write) {
  const auto lies_in = [&](const Buffer& buffer) {
    return address >= buffer.begin && address - buffer.begin < buffer.bytes &&
           bytes <= buffer.bytes - (address - buffer.begin);
  };
  if (last_ >= buffers_.size() || !lies_in(buffers_[last_])) {
    for (last_ = 0; last_ < buffers_.size() && !lies_in(buffers_[last_]);) ++last_;
    if (last_ == buffers_.size())
      throw Error(std::to_string(bytes) + " bytes of global memory lie in no buffer");
  }
  if (write && !buffers_[last_].writable) throw Error("an input is written");
  return reinterpret_cast<unsigned char*>(address);
}

GlobalMemory*& TheMemory() {
  static GlobalMemory* memory = nullptr;
  return memory;
}

}  // namespace ptx
}  // namespace performer
