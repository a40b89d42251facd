// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CORE_STATUS_H_
#define JAX_EP_CSRC_CORE_STATUS_H_

#include <string>
#include <utility>

namespace jax_ep {

// The codes and their numbers are absl's, so that a layer above maps them one to one.
enum class StatusCode {
  kOk = 0,
  kInvalidArgument = 3,
  kDeadlineExceeded = 4,
  kResourceExhausted = 8,
  kFailedPrecondition = 9,
  kInternal = 13,
};

// The outcome of an operation. Nothing in csrc throws: errors travel as values of this type.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  static Status invalid_argument(std::string message) {
    return {StatusCode::kInvalidArgument, std::move(message)};
  }

  [[nodiscard]] bool ok() const { return code_ == StatusCode::kOk; }
  [[nodiscard]] StatusCode code() const { return code_; }
  [[nodiscard]] const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

}  // namespace jax_ep

// Returns a failed status to the caller, which must itself return a Status.
#define JAX_EP_RETURN_IF_ERROR(expression)                                      \
  do {                                                                          \
    if (::jax_ep::Status status_ = (expression); !status_.ok()) return status_; \
  } while (false)

#endif  // JAX_EP_CSRC_CORE_STATUS_H_
