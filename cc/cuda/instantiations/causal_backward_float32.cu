#define PERFORMER_TYPE float
#include "cuda/kernels/causal_backward/instance.cuh"
