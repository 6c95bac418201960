#define PERFORMER_TYPE float
#include "cuda/causal_instance.cuh"
