// SPDX-License-Identifier: Apache-2.0
// Kernels on the simulator; one function per operation and source file, so that a mutant of one
// kernel compiles quickly.
#ifndef JAX_EP_CSRC_TESTING_SIMULATED_KERNEL_H_
#define JAX_EP_CSRC_TESTING_SIMULATED_KERNEL_H_

#include <cstdint>
#include <functional>
#include <type_traits>

#include "csrc/core/kernel_params.h"
#include "csrc/device/row_type_of.h"

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

// The same of a call that leaves out who does not come: with missing_ranks.
SimulatedKernel simulated_masking_kernel(const PlanDispatchParams& params);
SimulatedKernel simulated_masking_kernel(const CombineParams& params);

// Waits for a peer. After its first poll it stands still past the deadline; what it waits for comes
// meanwhile.
SimulatedKernel simulated_wait(const RankView& view, int32_t peer);

// The kernel of a row type that `use(std::type_identity<RowType>{})` gives. Of all dtypes but in
// most mutants (mutants.py), which are compiled for one in less than half of the time.
template <typename Use>
SimulatedKernel simulated_kernel_of_dtype(DType dtype, const Use& use) {
#ifdef JAX_EP_SIMULATED_ROW_TYPE
  static_cast<void>(dtype);
  return use(std::type_identity<dev::JAX_EP_SIMULATED_ROW_TYPE>{});
#else
  return with_row_type(dtype, SimulatedKernel{}, use);
#endif
}

template <typename Kernel, typename Config, typename Params>
SimulatedKernel simulated_kernel_of(const Params& params) {
  return {Config::kWarps * 32, sizeof(typename Config::SharedStorage), [params] {
            Kernel(params).run();
          }};
}

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_TESTING_SIMULATED_KERNEL_H_
