#define PERFORMER_TYPE float
#include "cuda/kernels/near_far_backward/instance.cuh"
