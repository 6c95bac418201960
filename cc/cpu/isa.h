// Which instruction sets the kernels are compiled for, and the namespace of each.
//
// kernels.cc is compiled once per instruction set with PERFORMER_ISA defined. Everything such a
// file defines lives in the namespace performer::cpu::PERFORMER_ISA, and it uses no inline function
// of other headers beyond the compiler's built-ins: the linker keeps one copy of an inline
// function, and it must not be one that needs a newer processor.
#pragma once

#ifndef PERFORMER_ISA
#error "compile this file with PERFORMER_ISA=v2, v3, v4, v4bf16, neon or generic"
#endif

#define PERFORMER_ISA_BEGIN \
  namespace performer {     \
  namespace cpu {           \
  namespace PERFORMER_ISA {
#define PERFORMER_ISA_END \
  }                       \
  }                       \
  }
