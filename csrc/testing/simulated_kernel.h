// SPDX-License-Identifier: Apache-2.0
// Kernels on the simulator; one function per operation and source file, so that a mutant of one
// kernel compiles quickly.
#ifndef JAX_EP_CSRC_TESTING_SIMULATED_KERNEL_H_
#define JAX_EP_CSRC_TESTING_SIMULATED_KERNEL_H_

#include <cstdint>
#include <functional>

#include "csrc/core/kernel_params.h"

namespace jax_ep {

struct SimulatedKernel {
  uint32_t threads;
  uint32_t shared_bytes;
  std::function<void()> body;
};

// Blocks small enough for the simulator, and yet with several warps of every role somewhere.
SimulatedKernel simulated_kernel(const PlanParams& params);
SimulatedKernel simulated_kernel(const DispatchParams& params);
SimulatedKernel simulated_kernel(const CombineParams& params);
SimulatedKernel simulated_kernel(const PlanDispatchParams& params);

// Likewise, of a call that fits_low_latency (csrc/core/low_latency_fit.h).
SimulatedKernel simulated_low_latency_kernel(const PlanDispatchParams& params);
SimulatedKernel simulated_low_latency_kernel(const CombineParams& params);

// Waits for a peer. After its first poll it stands still past the deadline; what it waits for comes
// meanwhile.
SimulatedKernel simulated_wait(const RankView& view, int32_t peer);

template <typename Kernel, typename Config, typename Params>
SimulatedKernel simulated_kernel_of(const Params& params) {
  return {Config::kWarps * 32, sizeof(typename Config::SharedStorage), [params] {
            Kernel(params).run();
          }};
}

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_TESTING_SIMULATED_KERNEL_H_
