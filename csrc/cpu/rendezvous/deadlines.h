// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CPU_RENDEZVOUS_DEADLINES_H_
#define JAX_EP_CSRC_CPU_RENDEZVOUS_DEADLINES_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <utility>

namespace jax_ep {

// One thread that calls back when a deadline passes, unless it was cancelled before.
class Deadlines {
 public:
  using Clock = std::chrono::steady_clock;
  using Ticket = std::pair<Clock::time_point, uint64_t>;

  // The process's. Its thread starts with the first deadline. Never destroyed.
  static Deadlines& shared();

  Deadlines(const Deadlines&) = delete;
  Deadlines& operator=(const Deadlines&) = delete;

  // `expired` runs on the thread of deadlines, so it must not block. It may still run if the
  // cancellation comes too late.
  Ticket add(Clock::time_point deadline, std::function<void()> expired);
  void cancel(const Ticket& ticket);

  // Deadlines neither passed nor cancelled (for tests).
  [[nodiscard]] int64_t num_pending() const;

 private:
  struct Impl;
  Deadlines();
  ~Deadlines() = delete;
  Impl* impl_;
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_RENDEZVOUS_DEADLINES_H_
