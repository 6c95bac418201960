#define PERFORMER_TYPE float
#include "cuda/kernels/near_far/instance.cuh"
