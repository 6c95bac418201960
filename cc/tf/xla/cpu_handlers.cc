// XLA's custom calls on the CPU: the driver of the CPU kernels on XLA's intra-op threads.
#include "cpu/run.h"
#include "tf/xla/handler.h"
#include "tf/xla/threads.h"

namespace performer {
namespace {

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

template <Op op>
XLA_FFI_Error* Handler(XLA_FFI_CallFrame* frame) {
  static const auto* const handler =
      WithArguments(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()).To(RunOnHost<op>).release();
  return handler->Call(frame);
}

[[maybe_unused]] const bool registered = [] {
  RegisterHandler(Op::kSummarize, "Host", Handler<Op::kSummarize>);
  RegisterHandler(Op::kRead, "Host", Handler<Op::kRead>);
  RegisterHandler(Op::kCausal, "Host", Handler<Op::kCausal>);
  RegisterHandler(Op::kSummarizeGrad, "Host", Handler<Op::kSummarizeGrad>);
  RegisterHandler(Op::kReadGrad, "Host", Handler<Op::kReadGrad>);
  RegisterHandler(Op::kCausalGrad, "Host", Handler<Op::kCausalGrad>);
  return true;
}();

}  // namespace
}  // namespace performer
