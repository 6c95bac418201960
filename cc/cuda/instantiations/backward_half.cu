#define PERFORMER_TYPE Half
#include "cuda/kernels/backward/instance.cuh"
