#define PERFORMER_TYPE Half
#include "cuda/kernels/near_far/instance.cuh"
