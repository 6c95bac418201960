// What a processor must have for the kernels of an instruction set: PERFORMER_PROCESSOR_HAS(name) is
// true or false on the processor that asks.
#pragma once

#define PERFORMER_PROCESSOR_HAS(isa) PERFORMER_PROCESSOR_HAS_##isa

#define PERFORMER_PROCESSOR_HAS_generic true
#define PERFORMER_PROCESSOR_HAS_neon true
#define PERFORMER_PROCESSOR_HAS_v2 (__builtin_cpu_supports("x86-64-v2") != 0)
#define PERFORMER_PROCESSOR_HAS_v3 (__builtin_cpu_supports("x86-64-v3") != 0)
#define PERFORMER_PROCESSOR_HAS_v4 (__builtin_cpu_supports("x86-64-v4") != 0)
#define PERFORMER_PROCESSOR_HAS_v4bf16 \
  (PERFORMER_PROCESSOR_HAS_v4 && __builtin_cpu_supports("avx512bf16") != 0)
