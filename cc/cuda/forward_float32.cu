#define PERFORMER_TYPE float
#include "cuda/forward_instance.cuh"
