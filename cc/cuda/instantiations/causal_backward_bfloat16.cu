#define PERFORMER_TYPE BFloat16
#include "cuda/kernels/causal_backward/instance.cuh"
