#include "cpu/kernels/near_far/kernels.h"

#include "cpu/kernels/near_far/decode.h"
#include "cpu/kernels/near_far/near_far.h"
#include "cpu/kernels/near_far_backward/near_far_backward.h"

PERFORMER_ISA_BEGIN

bool RunNearFar(const NearFarParams& params, const PERFORMER_ACC* query_projection,
                const PERFORMER_ACC* key_projection, WorkRange range, const Sharing& sharing) {
  if (query_projection == nullptr) return DecodeNearFar<PERFORMER_ACC>(params, range);
  return NearFar<PERFORMER_ACC>(params, query_projection, key_projection, range, sharing);
}

bool RunNearFarGrad(const NearFarGradParams& params, const PERFORMER_ACC* query_projection,
                    const PERFORMER_ACC* key_projection, WorkRange range, const Sharing& sharing,
                    PERFORMER_ACC* key_bias, CausalGradPartial<PERFORMER_ACC> partial) {
  return NearFarGrad<PERFORMER_ACC>(params, query_projection, key_projection, range, sharing,
                                    key_bias, partial);
}

PERFORMER_ISA_END
