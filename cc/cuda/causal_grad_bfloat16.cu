#define PERFORMER_TYPE BFloat16
#include "cuda/causal_grad_instance.cuh"
