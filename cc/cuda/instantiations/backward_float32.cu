#define PERFORMER_TYPE float
#include "cuda/kernels/backward/instance.cuh"
