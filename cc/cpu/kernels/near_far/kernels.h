// The kernels of near-and-far attention. A file of their own (kernels.cc) holds them, which is
// compiled beside kernels/kernels.cc: the two take long.
#pragma once
#include "cpu/isa.h"
#include "cpu/memory/layout.h"
#include "cpu/sharing.h"

PERFORMER_ISA_BEGIN

// near_far and near_far_grad of Kernels (kernels/kernels.h). RunNearFar without packed projections is
// for a single query, the last row of causal keys.
bool RunNearFar(const NearFarParams& params, const PERFORMER_ACC* query_projection,
                const PERFORMER_ACC* key_projection, WorkRange range, const Sharing& sharing);
bool RunNearFarGrad(const NearFarGradParams& params, const PERFORMER_ACC* query_projection,
                    const PERFORMER_ACC* key_projection, WorkRange range, const Sharing& sharing,
                    PERFORMER_ACC* key_bias, CausalGradPartial<PERFORMER_ACC> partial);

PERFORMER_ISA_END
