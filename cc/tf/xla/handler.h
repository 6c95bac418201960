// What the handlers of all platforms share: they turn the operands, results and attributes of a
// custom call into a Call, and register with TensorFlow's copy of XLA.
//
// The custom calls are the contract between the lowering (in _xla.so), which writes them, and the
// handlers (in _ops.so), which read them. There is one target for each operator, with the
// operator's name. Operands and results are its inputs and outputs in the order of the signature,
// row-major. The attributes are those of VisitAttributes: a feature map is a string with its name,
// a double is f64, an int64_t is i64. Offsets may hold a mark (other_count.h).
#pragma once
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/params.h"
#include "tf/xla/other_count.h"
#include "xla/ffi/api/ffi.h"

namespace xla {
namespace ffi {
// The header that declares it would include all of XLA. The symbol is weak: where TensorFlow does
// not have it, the library still loads, and only jit_compile=True does not work.
__attribute__((weak)) const XLA_FFI_Api* GetXlaFfiApi();
}  // namespace ffi
}  // namespace xla

namespace performer {

namespace ffi = xla::ffi;

inline ffi::Error ToXla(const Status& status) {
  switch (status.code()) {
    case Code::kOk:
      return ffi::Error::Success();
    case Code::kInvalidArgument:
      return ffi::Error(ffi::ErrorCode::kInvalidArgument, status.message());
    case Code::kFailedPrecondition:
      return ffi::Error(ffi::ErrorCode::kFailedPrecondition, status.message());
    case Code::kResourceExhausted:
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, status.message());
    case Code::kInternal:
      break;
  }
  return ffi::Error(ffi::ErrorCode::kInternal, status.message());
}

inline Status FromXla(ffi::DataType type, DType* dtype) {
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

// The type of an argument of a call of type `dtype`.
inline ffi::DataType ToXla(ArgumentType type, DType dtype) {
  if (type == ArgumentType::kOffsets || type == ArgumentType::kStart) return ffi::DataType::S64;
  if (dtype == DType::kFloat64) return ffi::DataType::F64;
  if (type == ArgumentType::kState || dtype == DType::kFloat32) return ffi::DataType::F32;
  return dtype == DType::kHalf ? ffi::DataType::F16 : ffi::DataType::BF16;
}

inline Shape FromXla(ffi::AnyBuffer::Dimensions dimensions) {
  return {true, {dimensions.begin(), dimensions.end()}};
}

// Reads one attribute of a custom call.
template <class T>
bool ReadAttribute(const ffi::Dictionary& attributes, const char* name, T* value) {
  const ffi::ErrorOr<T> found = attributes.get<T>(name);
  if (found.has_value()) *value = *found;
  return found.has_value();
}
inline bool ReadAttribute(const ffi::Dictionary& attributes, const char* name, FeatureMap* value) {
  std::string_view map;
  return ReadAttribute(attributes, name, &map) && ParseFeatureMap(std::string(map), value).ok();
}

// Refuses a buffer of another type. A program that was not made by the lowering may hand over
// anything.
inline Status CheckType(const Argument& argument, DType dtype, const ffi::AnyBuffer& buffer) {
  const ffi::DataType wanted = ToXla(argument.type, dtype), given = buffer.element_type();
  if (given == wanted) return Status();
  std::ostringstream message;
  message << argument.name << " must have type " << wanted << " in an XLA program; got " << given;
  return Status::InvalidArgument(message.str());
}

// Operands and results as the Call of an operator. Their number, types and shapes are checked, and
// so are the attributes.
inline Status MakeCall(Op op, const ffi::Dictionary& attributes, ffi::RemainingArgs arguments,
                       ffi::RemainingRets results, Call* call) {
  const Signature& signature = SignatureOf(op);
  bool fits =
      arguments.size() == signature.inputs.size() && results.size() == signature.outputs.size();
  VisitAttributes(call->attributes, [&](const char* name, auto& value) {
    fits = fits && ReadAttribute(attributes, name, &value);
  });
  const Status other_version = Status::InvalidArgument(
      std::string(signature.name) + ": the XLA program was made by another version of Performer");
  if (!fits) return other_version;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto buffer = arguments.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return other_version;
    if (i == 0) PERFORMER_RETURN_IF_ERROR(FromXla(buffer->element_type(), &call->dtype));
    PERFORMER_RETURN_IF_ERROR(CheckType(signature.inputs[i], call->dtype, *buffer));
    call->input_shapes.push_back(FromXla(buffer->dimensions()));
    call->inputs.push_back(buffer->untyped_data());
  }
  std::vector<Shape> shapes;
  PERFORMER_RETURN_IF_ERROR(
      InferShapes(op, call->attributes, call->input_shapes, &call->dims, &shapes));
  for (size_t i = 0; i < results.size(); ++i) {
    const Argument& output = signature.outputs[i];
    auto buffer = results.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return other_version;
    PERFORMER_RETURN_IF_ERROR(CheckType(output, call->dtype, **buffer));
    const Shape shape = FromXla((*buffer)->dimensions());
    if (shape.dims != shapes[i].dims)
      return Status::InvalidArgument("the result " + std::string(output.name) +
                                     " must have shape " + ToString(shapes[i]) +
                                     " in an XLA program; got " + ToString(shape));
    call->outputs.push_back((*buffer)->untyped_data());
  }
  return Status();
}

// Completes a binding that has the context of its platform.
template <class Binding>
auto WithArguments(Binding binding) {
  return std::move(binding).Attrs().RemainingArgs().RemainingRets();
}

// Registers a handler for one operator and platform.
inline void RegisterHandler(Op op, const char* platform, XLA_FFI_Handler* handler) {
  if (&ffi::GetXlaFfiApi == nullptr) return;
  const XLA_FFI_Api* api = ffi::GetXlaFfiApi();
  // Where XLA refuses, the target stays unknown, and XLA reports that when it meets the target.
  if (XLA_FFI_Error* error =
          ffi::Ffi::RegisterStaticHandler(api, SignatureOf(op).name, platform, handler)) {
    XLA_FFI_Error_Destroy_Args destroy{XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
    api->XLA_FFI_Error_Destroy(&destroy);
  }
}

}  // namespace performer
