// The outcome of a core function: OK, or a code and a message for the user. The core neither throws
// nor aborts.
#pragma once
#include <string>
#include <utility>

namespace performer {

enum class Code { kOk, kInvalidArgument, kFailedPrecondition, kResourceExhausted, kInternal };

class [[nodiscard]] Status {
 public:
  Status() = default;
  static Status InvalidArgument(std::string message) {
    return Status(Code::kInvalidArgument, std::move(message));
  }
  // The call cannot run on this machine: a driver that is too old, a device that is missing.
  static Status FailedPrecondition(std::string message) {
    return Status(Code::kFailedPrecondition, std::move(message));
  }
  static Status ResourceExhausted(std::string message) {
    return Status(Code::kResourceExhausted, std::move(message));
  }
  // Neither the caller's fault nor a lack of memory: an error of a driver or a device.
  static Status Internal(std::string message) {
    return Status(Code::kInternal, std::move(message));
  }

  bool ok() const { return code_ == Code::kOk; }
  Code code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}

  Code code_ = Code::kOk;
  std::string message_;
};

}  // namespace performer

// Returns from the enclosing function with the status of `expression` unless it is OK.
#define PERFORMER_RETURN_IF_ERROR(expression)   \
  do {                                          \
    ::performer::Status status_ = (expression); \
    if (!status_.ok()) return status_;          \
  } while (false)
