#define PERFORMER_TYPE Half
#include "cuda/causal_instance.cuh"
