#define PERFORMER_TYPE BFloat16
#include "cuda/bidirectional_grad_instance.cuh"
