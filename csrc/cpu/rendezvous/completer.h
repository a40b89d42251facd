// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CPU_RENDEZVOUS_COMPLETER_H_
#define JAX_EP_CSRC_CPU_RENDEZVOUS_COMPLETER_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>

#include "csrc/cpu/float_env.h"

namespace jax_ep {

// Runs callbacks that may block on each other: each on a thread that runs nothing else until
// the callback returns. Threads are kept for the next callbacks, made when none is free, and
// end when they have been idle for a while; so there are as many as callbacks ever ran at the
// same time.
class Completer {
 public:
  explicit Completer(std::chrono::milliseconds idle_timeout);
  // Callbacks already posted still run.
  ~Completer();
  Completer(const Completer&) = delete;
  Completer& operator=(const Completer&) = delete;

  // The process's. Never destroyed: its threads may outlive static destruction.
  static Completer& shared();

  void post(std::function<void()> callback);

  // Threads alive now, busy or idle (for tests).
  [[nodiscard]] int64_t num_threads() const;

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

// Posts to the process's a callback in which XLA continues a program, with that program's
// floating-point modes: it is to compute as it would have on its own thread.
void post_with(const FloatEnv& float_env, std::function<void()> callback);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_RENDEZVOUS_COMPLETER_H_
