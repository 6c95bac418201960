#define PERFORMER_TYPE Half
#include "cuda/kernels/causal/instance.cuh"
