// What the drivers of all operators share: strides, kernels, threads, packed projections.
#pragma once
#include <algorithm>
#include <cmath>

#include "cpu/driver/work_division.h"
#include "cpu/kernels/kernels.h"

namespace performer {
namespace cpu {

template <class Acc>
class Driver {
 public:
  Driver(const Common& call, const Kernels<Acc>& kernels, const Threads& threads)
      : call_(call),
        dims_(call.dims),
        strides_(MakeStrides<Acc>(call.dims)),
        kernels_(kernels),
        threads_(threads),
        parallel_for_(threads.parallel_for) {}

 protected:
  double RootScale() const { return std::sqrt(call_.attributes.ResolvedScale(strides_.d)); }

  // Nanoseconds for one row that needs factor * M * D multiply-adds or additions. They are for the
  // caller's scheduler, which compares them with the price of waking a thread. The rate is an
  // assumption for all processors and operators alike; wide vectors are several times as fast.
  int64_t Cost(int64_t factor) const {
    constexpr int64_t kAssumedPerNanosecond = 20;
    return factor * strides_.m * std::max(strides_.d, strides_.e) / kAssumedPerNanosecond + 1;
  }

  // Packs the projections of `side` (KeySide or QuerySide): `pack` is one of the kernels that do.
  template <class Pack, class Side>
  Status PackProjections(Pack pack, const Side& side, Buffer<Acc>* packed) const {
    const int64_t size = PackedProjection<Acc>::Size(strides_), given = strides_.m * strides_.d;
    PERFORMER_RETURN_IF_ERROR(
        Allocate(side.projection_heads * size, "the packed projection", packed));
    parallel_for_(side.projection_heads, given, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h)
        pack(call_.attributes, call_.dtype, strides_,
             static_cast<const Acc*>(side.projection) + h * given, packed->get() + h * size);
    });
    return Status();
  }

  // What a kernel for whole sequences may use, `in_flight` of which run at the same time: together
  // twice the size of the values, or of keys and values, in the type of sums.
  Sharing Share(int64_t in_flight, int64_t width, int64_t cost_per_row) const {
    Sharing sharing;
    sharing.workspace = 2 * dims_.batch * dims_.keys * dims_.groups * width *
                        static_cast<int64_t>(sizeof(Acc)) / std::max<int64_t>(in_flight, 1);
    sharing.cost_per_row = cost_per_row;
    return sharing;
  }

  const Common& call_;
  const Dims& dims_;
  const Strides strides_;
  const Kernels<Acc>& kernels_;
  const Threads& threads_;
  const ParallelFor& parallel_for_;
};

}  // namespace cpu
}  // namespace performer
