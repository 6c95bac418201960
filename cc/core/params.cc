#include "core/params.h"

#include <cstring>

namespace performer {
namespace {

// The arguments of one call, found by name.
class Arguments {
 public:
  Arguments(Op op, const Call& call) : signature_(SignatureOf(op)), call_(call) {}

  const void* In(const char* name) const { return call_.inputs[Index(signature_.inputs, name)]; }
  void* Out(const char* name) const { return call_.outputs[Index(signature_.outputs, name)]; }
  int64_t Dim(const char* name, int axis) const {
    return call_.input_shapes[Index(signature_.inputs, name)].dims[axis];
  }

  Common Shared() const {
    const int64_t* offsets = call_.attributes.packed ? call_.offsets.data() : nullptr;
    return {call_.dtype, call_.attributes, call_.dims, offsets};
  }
  QuerySide Queries() const {
    return {In("query"), In("query_projection"), Dim("query_projection", 0), In("feature_bias"),
            Dim("feature_bias", 0)};
  }
  KeySide Keys() const {
    return {In("key"),      In("value"),        In("key_projection"), Dim("key_projection", 0),
            In("key_bias"), Dim("key_bias", 0), Dim("key_bias", 1),   Dim("key_bias", 2)};
  }
  State StateIn(const char* log_mass, const char* mean) const {
    return {In(log_mass), In(mean), Dim(log_mass, 0)};
  }
  MutableState StateOut(const char* log_mass, const char* mean) const {
    return {Out(log_mass), Out(mean)};
  }
  const int64_t* Start() const { return static_cast<const int64_t*>(In("start")); }
  QueryGradients QueryGrads() const {
    return {Out("grad_query"), Out("grad_query_projection"), Out("grad_feature_bias")};
  }
  KeyGradients KeyGrads() const {
    return {Out("grad_key"), Out("grad_value"), Out("grad_key_projection"), Out("grad_key_bias")};
  }

 private:
  static size_t Index(const std::vector<Argument>& arguments, const char* name) {
    size_t i = 0;
    while (std::strcmp(arguments[i].name, name) != 0) ++i;
    return i;
  }

  const Signature& signature_;
  const Call& call_;
};

}  // namespace

Status CheckOffsets(Op op, const Call& call) {
  if (!call.attributes.packed) return Status();
  return ValidateOffsets(call.offsets.data(), call.dims.sequences,
                         HasKeys(op) ? call.dims.keys : call.dims.queries);
}

Status TakeOffsets(Op op, Call* call) {
  if (IsNearFar(op)) {
    call->start = *Arguments(op, *call).Start();
    PERFORMER_RETURN_IF_ERROR(ValidateStart(call->start, call->attributes.packed));
  }
  if (!call->attributes.packed) return Status();
  const auto* given = static_cast<const int64_t*>(call->inputs[OffsetsIndex(op)]);
  call->offsets.assign(given, given + call->dims.sequences + 1);
  return CheckOffsets(op, *call);
}

// The order of the values below is that of the members of the structs.
SummarizeParams MakeSummarizeParams(const Call& call) {
  const Arguments of(Op::kSummarize, call);
  return {of.Shared(), of.Keys(), of.StateOut("log_mass", "mean")};
}

ReadParams MakeReadParams(const Call& call) {
  const Arguments of(Op::kRead, call);
  return {of.Shared(), of.Queries(), of.StateIn("log_mass", "mean"), of.Out("out")};
}

CausalParams MakeCausalParams(const Call& call) {
  const Arguments of(Op::kCausal, call);
  return {of.Shared(),   of.Queries(),
          of.Keys(),     of.StateIn("initial_log_mass", "initial_mean"),
          of.Out("out"), of.StateOut("log_mass", "mean")};
}

NearFarParams MakeNearFarParams(const Call& call) {
  const Arguments of(Op::kNearFar, call);
  return {of.Shared(),
          of.Queries(),
          of.Keys(),
          of.StateIn("initial_log_mass", "initial_mean"),
          call.start,
          of.Out("out"),
          of.Out("log_weight"),
          of.StateOut("log_mass", "mean")};
}

SummarizeGradParams MakeSummarizeGradParams(const Call& call) {
  const Arguments of(Op::kSummarizeGrad, call);
  return {of.Shared(), of.Keys(), of.StateIn("log_mass", "mean"),
          of.StateIn("grad_log_mass", "grad_mean"), of.KeyGrads()};
}

ReadGradParams MakeReadGradParams(const Call& call) {
  const Arguments of(Op::kReadGrad, call);
  return {of.Shared(),       of.Queries(),    of.StateIn("log_mass", "mean"),
          of.In("grad_out"), of.QueryGrads(), of.StateOut("grad_log_mass", "grad_mean")};
}

CausalGradParams MakeCausalGradParams(const Call& call) {
  const Arguments of(Op::kCausalGrad, call);
  return {of.Shared(),
          of.Queries(),
          of.Keys(),
          of.StateIn("initial_log_mass", "initial_mean"),
          of.In("grad_out"),
          of.StateIn("grad_log_mass", "grad_mean"),
          of.QueryGrads(),
          of.KeyGrads(),
          of.StateOut("grad_initial_log_mass", "grad_initial_mean")};
}

NearFarGradParams MakeNearFarGradParams(const Call& call) {
  const Arguments of(Op::kNearFarGrad, call);
  return {of.Shared(),
          of.Queries(),
          of.Keys(),
          of.StateIn("initial_log_mass", "initial_mean"),
          call.start,
          of.In("log_weight"),
          of.In("grad_out"),
          of.In("grad_log_weight"),
          of.StateIn("grad_log_mass", "grad_mean"),
          of.QueryGrads(),
          of.KeyGrads(),
          of.StateOut("grad_initial_log_mass", "grad_initial_mean")};
}

}  // namespace performer
