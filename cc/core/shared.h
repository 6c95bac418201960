// What a shared library of the kernels shows to its callers; all else is hidden.
#pragma once

#define PERFORMER_SHARED __attribute__((visibility("default")))
