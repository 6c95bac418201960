#define PERFORMER_TYPE BFloat16
#include "cuda/kernels/backward/instance.cuh"
