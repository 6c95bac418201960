#define PERFORMER_TYPE BFloat16
#include "cuda/kernels/causal/instance.cuh"
