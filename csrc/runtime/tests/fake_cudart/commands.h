// SPDX-License-Identifier: Apache-2.0
// The fake CUDA runtime as a language of lines, for tests that reach it from another process or
// from Python.
#ifndef JAX_EP_CSRC_RUNTIME_TESTS_FAKE_CUDART_COMMANDS_H_
#define JAX_EP_CSRC_RUNTIME_TESTS_FAKE_CUDART_COMMANDS_H_

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace jax_ep::fake_cudart {

// Words that stand between spaces.
std::vector<std::string> words_of(std::string_view line);

// Does what a line says; the answer may have several lines. Nothing if there is no such command.
//   reset DEVICES FIRST_UUID     fail FUNCTION|any N ERROR     trap
//   sms N, memory BYTES          (of every device)
//   unreachable FROM TO          kernels of one do not reach the other's memory
//   run_kernels DEVICE           finish_kernels                finish_kernels_after MILLISECONDS
//   num_waiting
//   calls, leaks, violations, abandoned_mappings, contexts, launches     (one a line)
//   pending_failures             last_error
std::optional<std::string> run_command(std::string_view line);

}  // namespace jax_ep::fake_cudart

// For Python: the same; the answer to what is no command begins with "unknown command". It lives
// until the thread's next call.
extern "C" __attribute__((visibility("default"))) const char* jax_ep_fake_cudart(const char* line);

#endif  // JAX_EP_CSRC_RUNTIME_TESTS_FAKE_CUDART_COMMANDS_H_
