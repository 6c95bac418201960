// The namespace of the instruction set that kernels are compiled for.
//
// The files kernels.cc are compiled once for each instruction set, with PERFORMER_ISA defined.
// Everything that they define lives in the namespace performer::cpu::PERFORMER_ISA. They call no
// inline function of other headers that is not always inlined: the linker keeps one copy of an
// inline function, and that copy must not need a newer processor.
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
