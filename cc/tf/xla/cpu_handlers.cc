// The handlers of XLA's custom calls on the CPU: the driver of the CPU kernels on XLA's intra-op
// threads.
#include "cpu/run.h"
#include "tf/xla/handler.h"
#include "tf/xla/threads.h"

namespace performer {
namespace {

template <Op op>
ffi::Error RunOnHost(ffi::ThreadPool pool, ffi::Dictionary attributes, ffi::RemainingArgs arguments,
                     ffi::RemainingRets results) {
  const auto run = [&]() -> Status {
    Call call;
    PERFORMER_RETURN_IF_ERROR(MakeCall(op, attributes, arguments, results, &call));
    PERFORMER_RETURN_IF_ERROR(ExplainOtherCount(op, call, TakeOffsets(op, &call)));
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
#define PERFORMER_REGISTER(op) RegisterHandler(Op::k##op, "Host", Handler<Op::k##op>);
  PERFORMER_FOR_EACH_OP(PERFORMER_REGISTER)
#undef PERFORMER_REGISTER
  return true;
}();

}  // namespace
}  // namespace performer
