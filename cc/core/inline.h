#pragma once

// For small functions in headers that files of several instruction sets include: no out-of-line
// copy may be shared among them.
#define PERFORMER_INLINE inline __attribute__((always_inline))

// Bodies of loops over tiles (tile.h). A body that is called, not inlined, keeps its tile in
// memory instead of registers.
#define PERFORMER_TILE_BODY __attribute__((always_inline))

// For products: what is inlined into larger code loses registers to it.
#define PERFORMER_NOINLINE __attribute__((noinline))
