#include <algorithm>
#include <string>
#include <utility>

#include "cuda/device/ptx.h"  // BFloat16, Half
#include "cuda/host/operators.h"
#include "cuda/run.h"

namespace performer {
namespace cuda {
namespace {

template <class T>
Status RunTyped(Op op, const Call& call, const Device& device) {
  switch (op) {
#define PERFORMER_CASE(op) \
  case Op::k##op:          \
    return Run##op<T>(Make##op##Params(call), device);
    PERFORMER_FOR_EACH_OP(PERFORMER_CASE)
#undef PERFORMER_CASE
    default:
      return Status::Internal("no kernel of this operator");
  }
}

}  // namespace

Status Supports(DType dtype, const Dims& dims) {
  if (dtype == DType::kFloat64)
    return Status::InvalidArgument(
        "the CUDA kernels take float32, bfloat16 and half; got float64, which runs on the CPU");
  const auto check = [](const char* name, int64_t size, int64_t max, const char* where) {
    if (size <= max) return Status();
    return Status::InvalidArgument(std::string(name) + " must be at most " + std::to_string(max) +
                                   where + " on a GPU; got " + std::to_string(size));
  };
  const bool wide = dtype != DType::kFloat32;
  const int64_t widest = wide ? kMaxHeadWidth : kMaxFloat32HeadWidth;
  const char* const type = wide ? "" : " in float32";
  PERFORMER_RETURN_IF_ERROR(check("key dimension D", dims.key_dim, widest, type));
  PERFORMER_RETURN_IF_ERROR(check("value dimension E", dims.value_dim, widest, type));
  PERFORMER_RETURN_IF_ERROR(check("number of query heads H", dims.heads, kMaxHeads, ""));
  PERFORMER_RETURN_IF_ERROR(check("number of key and value heads G", dims.groups, kMaxHeads, ""));
  // InferShapes keeps the products of two dimensions within int64.
  const int64_t heads = std::max<int64_t>({dims.heads, dims.groups, 1});
  for (const auto& [name, rows] : {std::pair("number of sequences N", dims.sequences),
                                   std::pair("number of queries B L", dims.batch * dims.queries),
                                   std::pair("number of keys B S", dims.batch * dims.keys)})
    if (rows > kMaxRows / heads)
      return Status::InvalidArgument(std::string(name) + " times that of heads must be at most " +
                                     std::to_string(kMaxRows) + " on a GPU; got " +
                                     std::to_string(rows) + " times " + std::to_string(heads));
  return Status();
}

Status Run(Op op, const Call& call, const Device& device) {
  PERFORMER_RETURN_IF_ERROR(Supports(call.dtype, call.dims));
  switch (call.dtype) {
    case DType::kBFloat16:
      return RunTyped<BFloat16>(op, call, device);
    case DType::kHalf:
      return RunTyped<Half>(op, call, device);
    default:
      return RunTyped<float>(op, call, device);
  }
}

}  // namespace cuda
}  // namespace performer
