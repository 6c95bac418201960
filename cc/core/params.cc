#include "core/params.h"

#include <cstring>

namespace performer {
namespace {

// Looks arguments up by name in one call.
class Arguments {
 public:
  Arguments(Op op, const Call& call) : signature_(SignatureOf(op)), call_(call) {}

  const void* In(const char* name) const { return call_.inputs[Index(signature_.inputs, name)]; }
  void* Out(const char* name) const { return call_.outputs[Index(signature_.outputs, name)]; }
  int64_t Dim(const char* name, int axis) const {
    return call_.input_shapes[Index(signature_.inputs, name)].dims[axis];
  }

  template <class Params>
  Params Start() const {
    Params params;
    params.dtype = call_.dtype;
    params.attributes = call_.attributes;
    params.dims = call_.dims;
    if (call_.attributes.packed) params.offsets = static_cast<const int64_t*>(In("offsets"));
    return params;
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
  const bool reads = op == Op::kRead || op == Op::kReadGrad;
  return ValidateOffsets(static_cast<const int64_t*>(call.inputs[OffsetsIndex(op)]),
                         call.dims.sequences, reads ? call.dims.queries : call.dims.keys);
}

SummarizeParams MakeSummarizeParams(const Call& call) {
  const Arguments arguments(Op::kSummarize, call);
  auto params = arguments.Start<SummarizeParams>();
  params.keys = arguments.Keys();
  params.state = arguments.StateOut("log_mass", "mean");
  return params;
}

ReadParams MakeReadParams(const Call& call) {
  const Arguments arguments(Op::kRead, call);
  auto params = arguments.Start<ReadParams>();
  params.queries = arguments.Queries();
  params.state = arguments.StateIn("log_mass", "mean");
  params.out = arguments.Out("out");
  return params;
}

CausalParams MakeCausalParams(const Call& call) {
  const Arguments arguments(Op::kCausal, call);
  auto params = arguments.Start<CausalParams>();
  params.queries = arguments.Queries();
  params.keys = arguments.Keys();
  params.initial = arguments.StateIn("initial_log_mass", "initial_mean");
  params.out = arguments.Out("out");
  params.state = arguments.StateOut("log_mass", "mean");
  return params;
}

SummarizeGradParams MakeSummarizeGradParams(const Call& call) {
  const Arguments arguments(Op::kSummarizeGrad, call);
  auto params = arguments.Start<SummarizeGradParams>();
  params.keys = arguments.Keys();
  params.state = arguments.StateIn("log_mass", "mean");
  params.grad_state = arguments.StateIn("grad_log_mass", "grad_mean");
  params.grad_keys = arguments.KeyGrads();
  return params;
}

ReadGradParams MakeReadGradParams(const Call& call) {
  const Arguments arguments(Op::kReadGrad, call);
  auto params = arguments.Start<ReadGradParams>();
  params.queries = arguments.Queries();
  params.state = arguments.StateIn("log_mass", "mean");
  params.grad_out = arguments.In("grad_out");
  params.grad_queries = arguments.QueryGrads();
  params.grad_state = arguments.StateOut("grad_log_mass", "grad_mean");
  return params;
}

CausalGradParams MakeCausalGradParams(const Call& call) {
  const Arguments arguments(Op::kCausalGrad, call);
  auto params = arguments.Start<CausalGradParams>();
  params.queries = arguments.Queries();
  params.keys = arguments.Keys();
  params.initial = arguments.StateIn("initial_log_mass", "initial_mean");
  params.grad_out = arguments.In("grad_out");
  params.grad_state = arguments.StateIn("grad_log_mass", "grad_mean");
  params.grad_queries = arguments.QueryGrads();
  params.grad_keys = arguments.KeyGrads();
  params.grad_initial = arguments.StateOut("grad_initial_log_mass", "grad_initial_mean");
  return params;
}

}  // namespace performer
