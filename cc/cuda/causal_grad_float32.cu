#define PERFORMER_TYPE float
#include "cuda/causal_grad_instance.cuh"
