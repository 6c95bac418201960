#define PERFORMER_TYPE BFloat16
#include "cuda/kernels/near_far_backward/instance.cuh"
