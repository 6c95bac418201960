#define PERFORMER_TYPE BFloat16
#include "cuda/kernels/forward/instance.cuh"
