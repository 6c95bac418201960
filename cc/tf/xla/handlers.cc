// What runs when an XLA program reaches a custom call of ours. Registered with TensorFlow's copy of
// XLA when the library is loaded; custom_call.h has the contract.
#include <string_view>

#include "core/params.h"
#include "cpu/run.h"
#include "tf/xla/custom_call.h"
#include "tf/xla/threads.h"
#include "xla/ffi/api/ffi.h"

namespace xla {
namespace ffi {
// Declared by a header that would bring all of XLA. Weak: where TensorFlow does not have it, the
// library still loads, and only jit_compile=True does not work.
__attribute__((weak)) const XLA_FFI_Api* GetXlaFfiApi();
}  // namespace ffi
}  // namespace xla

namespace performer {
namespace {

namespace ffi = xla::ffi;

ffi::Error ToXla(const Status& status) {
  switch (status.code()) {
    case Code::kOk:
      return ffi::Error::Success();
    case Code::kInvalidArgument:
      return ffi::Error(ffi::ErrorCode::kInvalidArgument, status.message());
    case Code::kResourceExhausted:
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, status.message());
  }
  return ffi::Error(ffi::ErrorCode::kInternal, status.message());
}

Status FromXla(ffi::DataType type, DType* dtype) {
  switch (type) {
    case ffi::DataType::F32:
      *dtype = DType::kFloat32;
      return Status();
    case ffi::DataType::BF16:
      *dtype = DType::kBFloat16;
      return Status();
    case ffi::DataType::F16:
      *dtype = DType::kHalf;
      return Status();
    case ffi::DataType::F64:
      *dtype = DType::kFloat64;
      return Status();
    default:
      return Status::InvalidArgument(
          "query, key and value must be float32, bfloat16, half or "
          "float64 in an XLA program; got another type");
  }
}

Shape FromXla(ffi::AnyBuffer::Dimensions dimensions) {
  return {true, {dimensions.begin(), dimensions.end()}};
}

// The attributes of a custom call.
struct CallAttributes {
  std::string_view feature_map;
  double scale;
  bool key_norm;
  double feature_epsilon;
  bool packed;
};

// Operands and results as the Call of an operator, its shapes accepted by InferShapes.
Status MakeCall(Op op, const CallAttributes& attributes, ffi::RemainingArgs arguments,
                ffi::RemainingRets results, Call* call) {
  PERFORMER_RETURN_IF_ERROR(
      ParseFeatureMap(std::string(attributes.feature_map), &call->attributes.feature_map));
  call->attributes.scale = attributes.scale;
  call->attributes.key_norm = attributes.key_norm;
  call->attributes.feature_epsilon = attributes.feature_epsilon;
  call->attributes.packed = attributes.packed;
  const Signature& signature = SignatureOf(op);
  if (arguments.size() != signature.inputs.size() || results.size() != signature.outputs.size())
    return Status::InvalidArgument(std::string(signature.name) +
                                   ": the XLA program was made by another version of Performer");
  for (size_t i = 0; i < arguments.size(); ++i) {
    const ffi::AnyBuffer buffer = *arguments.get<ffi::AnyBuffer>(i);
    if (i == 0) PERFORMER_RETURN_IF_ERROR(FromXla(buffer.element_type(), &call->dtype));
    call->input_shapes.push_back(FromXla(buffer.dimensions()));
    call->inputs.push_back(buffer.untyped_data());
  }
  for (size_t i = 0; i < results.size(); ++i)
    call->outputs.push_back((*results.get<ffi::AnyBuffer>(i))->untyped_data());
  std::vector<Shape> outputs;
  return InferShapes(op, call->attributes, call->input_shapes, &call->dims, &outputs);
}

template <Op op>
ffi::Error RunOnHost(ffi::ThreadPool pool, std::string_view feature_map, double scale,
                     bool key_norm, double feature_epsilon, bool packed,
                     ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  const auto run = [&]() -> Status {
    Call call;
    PERFORMER_RETURN_IF_ERROR(MakeCall(op, {feature_map, scale, key_norm, feature_epsilon, packed},
                                       arguments, results, &call));
    PERFORMER_RETURN_IF_ERROR(CheckOffsets(op, call));
    return cpu::Run(op, call, ThreadsOf(pool));
  };
  return ToXla(run());
}

// Completes a binding that has the context of its platform.
template <class Binding>
auto WithArguments(Binding binding) {
  return std::move(binding)
      .template Attr<std::string_view>(kFeatureMapAttribute)
      .template Attr<double>(kScaleAttribute)
      .template Attr<bool>(kKeyNormAttribute)
      .template Attr<double>(kFeatureEpsilonAttribute)
      .template Attr<bool>(kPackedAttribute)
      .RemainingArgs()
      .RemainingRets();
}

template <Op op>
XLA_FFI_Error* HostHandler(XLA_FFI_CallFrame* frame) {
  static const auto* const handler =
      WithArguments(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()).To(RunOnHost<op>).release();
  return handler->Call(frame);
}

void Register(const XLA_FFI_Api* api, Op op, const char* platform, XLA_FFI_Handler* handler) {
  // A refusal (XLA would say why) leaves the target unknown, which XLA reports when it compiles.
  if (XLA_FFI_Error* error =
          ffi::Ffi::RegisterStaticHandler(api, SignatureOf(op).name, platform, handler)) {
    XLA_FFI_Error_Destroy_Args destroy{XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
    api->XLA_FFI_Error_Destroy(&destroy);
  }
}

template <Op op>
void RegisterOp(const XLA_FFI_Api* api) {
  Register(api, op, "Host", HostHandler<op>);
}

[[maybe_unused]] const bool registered = [] {
  if (&ffi::GetXlaFfiApi == nullptr) return false;
  const XLA_FFI_Api* api = ffi::GetXlaFfiApi();
  RegisterOp<Op::kSummarize>(api);
  RegisterOp<Op::kRead>(api);
  RegisterOp<Op::kCausal>(api);
  RegisterOp<Op::kSummarizeGrad>(api);
  RegisterOp<Op::kReadGrad>(api);
  RegisterOp<Op::kCausalGrad>(api);
  return true;
}();

}  // namespace
}  // namespace performer
