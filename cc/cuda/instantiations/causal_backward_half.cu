#define PERFORMER_TYPE Half
#include "cuda/kernels/causal_backward/instance.cuh"
