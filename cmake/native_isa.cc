// Prints the instruction sets that this processor has, as a CMake list.
#include <cstdio>

#include "cpu/processor.h"

int main() {
#define PERFORMER_PRINT(isa) \
  if (PERFORMER_PROCESSOR_HAS(isa)) std::printf("%s;", #isa);
#ifdef __x86_64__
  PERFORMER_PRINT(v2)
  PERFORMER_PRINT(v3)
  PERFORMER_PRINT(v4)
  PERFORMER_PRINT(v4bf16)
#elif defined(__aarch64__)
  PERFORMER_PRINT(neon)
#endif
  PERFORMER_PRINT(generic)
}
