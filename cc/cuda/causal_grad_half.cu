#define PERFORMER_TYPE Half
#include "cuda/causal_grad_instance.cuh"
