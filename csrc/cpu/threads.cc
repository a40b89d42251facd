// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/threads.h"

#include <algorithm>
#include <system_error>
#include <utility>

#include "csrc/cpu/float_env.h"

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif

namespace jax_ep {
namespace {

void name_this_thread([[maybe_unused]] const char* name) {
#ifdef __linux__
  pthread_setname_np(pthread_self(), name);
#endif
}

}  // namespace

std::thread start_thread(const char* name, std::function<void()> body) {
  // std::thread's constructor is the only thing in csrc that throws by design.
  try {
    return std::thread([name, body = std::move(body)] {
      FloatEnv::apply_default();
      name_this_thread(name);
      body();
    });
  } catch (const std::system_error&) {
    return {};
  }
}

int num_usable_cores() {
#ifdef __linux__
  // The affinity mask, which containers and `taskset` narrow. A machine with more CPUs than the
  // mask has bits makes the call fail, so grow it.
  for (int num_cpus = CPU_SETSIZE; num_cpus <= (1 << 20); num_cpus *= 2) {
    cpu_set_t* const mask = CPU_ALLOC(num_cpus);
    if (mask == nullptr) break;
    const size_t bytes = CPU_ALLOC_SIZE(num_cpus);
    const bool known = sched_getaffinity(0, bytes, mask) == 0;
    const int count = known ? CPU_COUNT_S(bytes, mask) : 0;
    CPU_FREE(mask);
    if (known) return std::max(count, 1);
  }
#endif
  return std::max(static_cast<int>(std::thread::hardware_concurrency()), 1);
}

}  // namespace jax_ep
