#define PERFORMER_TYPE Half
#include "cuda/kernels/forward/instance.cuh"
