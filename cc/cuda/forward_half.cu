#define PERFORMER_TYPE Half
#include "cuda/forward_instance.cuh"
