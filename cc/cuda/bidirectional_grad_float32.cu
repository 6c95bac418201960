#define PERFORMER_TYPE float
#include "cuda/bidirectional_grad_instance.cuh"
