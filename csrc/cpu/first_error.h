// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CPU_FIRST_ERROR_H_
#define JAX_EP_CSRC_CPU_FIRST_ERROR_H_

#include <cstdint>
#include <limits>
#include <mutex>
#include <utility>

#include "csrc/core/status.h"

namespace jax_ep {

// Of the errors that parallel work finds, keeps the one at the smallest position, so that the
// message does not depend on timing.
class FirstError {
 public:
  void report(int64_t position, Status error) {
    const std::lock_guard lock(mutex_);
    if (position >= position_) return;
    position_ = position;
    error_ = std::move(error);
  }

  // After the parallel work has ended.
  [[nodiscard]] Status take() { return std::move(error_); }

 private:
  std::mutex mutex_;
  int64_t position_ = std::numeric_limits<int64_t>::max();
  Status error_;
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_FIRST_ERROR_H_
