// How functions are inlined.
#pragma once

// For small functions in headers that files of several instruction sets include. These files must
// not share an out-of-line copy.
#define PERFORMER_INLINE inline __attribute__((always_inline))

// For the bodies of loops over tiles (cpu/simd/tile.h). A body that is called instead of inlined
// keeps its tile in memory instead of registers.
#define PERFORMER_TILE_BODY __attribute__((always_inline))

// For matrix products. One that is inlined into larger code loses registers to that code.
#define PERFORMER_NOINLINE __attribute__((noinline))
