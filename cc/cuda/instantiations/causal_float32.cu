#define PERFORMER_TYPE float
#include "cuda/kernels/causal/instance.cuh"
