// The floating-point arithmetic of the kernels: that of IEEE 754, whatever mode a thread is in.
//
// Threads come from callers. Those of TensorFlow count denormals as zero (as arguments and as
// results), those of NumPy's callers do not; others may round in another direction or trap. As
// results must not depend on the thread, each sets its mode for the time of its work.
#pragma once
#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace performer {
namespace cpu {

// As long as it lives, this thread rounds to nearest, keeps denormals and traps nothing.
class StandardArithmetic {
 public:
  StandardArithmetic() : before_(Get()) { Set(kStandard); }
  StandardArithmetic(const StandardArithmetic&) = delete;
  StandardArithmetic& operator=(const StandardArithmetic&) = delete;
  ~StandardArithmetic() { Set(before_); }

 private:
#if defined(__SSE__)
  using Mode = unsigned int;
  static constexpr Mode kStandard = 0x1f80;  // MXCSR as a process begins: all exceptions masked
  static Mode Get() { return _mm_getcsr(); }
  static void Set(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  using Mode = uint64_t;
  static constexpr Mode kStandard = 0;  // FPCR as a process begins
  static Mode Get() {
    Mode mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void Set(Mode mode) { asm volatile("msr fpcr, %0" ::"r"(mode) : "memory"); }
#else
  using Mode = int;
  static constexpr Mode kStandard = 0;
  static Mode Get() { return 0; }
  static void Set(Mode) {}
#endif

  const Mode before_;
};

}  // namespace cpu
}  // namespace performer
