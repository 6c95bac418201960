#pragma once

// For small functions in headers that files of several instruction sets include: no out-of-line
// copy may be shared among them.
#define PERFORMER_INLINE inline __attribute__((always_inline))
