#define PERFORMER_TYPE Half
#include "cuda/bidirectional_grad_instance.cuh"
