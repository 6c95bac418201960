#define PERFORMER_TYPE Half
#include "cuda/kernels/near_far_backward/instance.cuh"
