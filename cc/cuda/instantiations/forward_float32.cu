#define PERFORMER_TYPE float
#include "cuda/kernels/forward/instance.cuh"
