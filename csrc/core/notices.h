// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CORE_NOTICES_H_
#define JAX_EP_CSRC_CORE_NOTICES_H_

#include <cstdint>
#include <optional>
#include <string>

namespace jax_ep {

// As Python's logging numbers them.
enum class NoticeLevel : int32_t { kInfo = 20, kWarning = 30, kError = 40 };

struct Notice {
  NoticeLevel level;
  std::string text;
};

// What the library has to say while programs run, for the layer above to log at once. An error that
// also ends a program is posted here too, because a program may hang or die before anybody reads
// its result: XLA ends a process whose collectives lack a device. Thread-safe.
class Notices {
 public:
  // The process's. Never destroyed.
  static Notices& shared();

  Notices(const Notices&) = delete;
  Notices& operator=(const Notices&) = delete;

  // Never blocks. If nobody reads, the newest are counted only.
  void post(NoticeLevel level, std::string text);

  // The oldest notice; waits for one. Nothing once stop() was called and all have been read.
  std::optional<Notice> next();
  // Ends the waiting of next(), for good.
  void stop();

 private:
  struct Impl;
  Notices();
  ~Notices() = delete;
  Impl* impl_;
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_NOTICES_H_
