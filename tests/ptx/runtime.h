// Takes the place of the CUDA runtime: what nvcc compiled for the host registers its kernels here
// and launches them, and they run as the PTX that was given.
#pragma once
#include <cstdint>
#include <map>
#include <string>

#include "ptx/program.h"

namespace performer {
namespace ptx {

struct Runtime {
  Program program;
  std::map<const void*, std::string> entries;  // mangled names of kernels, by host function
  std::map<const void*, int> shared_bytes;     // the most that a launch may ask for
  std::map<std::string, uint64_t> launches;    // by kernel
  std::string error;                           // what a launch did wrong
  int max_shared_bytes = 0;                    // of a block of this GPU
};
Runtime& TheRuntime();

}  // namespace ptx
}  // namespace performer
