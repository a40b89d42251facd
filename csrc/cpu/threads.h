// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CPU_THREADS_H_
#define JAX_EP_CSRC_CPU_THREADS_H_

#include <functional>
#include <thread>

namespace jax_ep {

// Starts a thread of the library, named for debuggers (at most 15 characters), with the default
// floating-point modes (a new thread would inherit its creator's). If the process may have no
// more threads, the result is not joinable and `body` is not run.
[[nodiscard]] std::thread start_thread(const char* name, std::function<void()> body);

// Cores that this process may run on, at least 1.
[[nodiscard]] int num_usable_cores();

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_THREADS_H_
