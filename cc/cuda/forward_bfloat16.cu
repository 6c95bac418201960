#define PERFORMER_TYPE BFloat16
#include "cuda/forward_instance.cuh"
