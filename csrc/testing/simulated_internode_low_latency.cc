// SPDX-License-Identifier: Apache-2.0
#include "csrc/testing/simulated_internode.h"
#include "csrc/testing/simulated_low_latency_kernels.h"

namespace jax_ep {

SimulatedKernel simulated_internode_kernel(
    const SimulatedLowLatencyParams<PlanDispatchOp>& params) {
  return simulated_low_latency_dispatch<dev::FarRanks<dev::SimulatedTransport>, false>(params);
}

SimulatedKernel simulated_internode_kernel(const SimulatedLowLatencyParams<CombineOp>& params) {
  return simulated_low_latency_combine<dev::FarRanks<dev::SimulatedTransport>, false>(params);
}

}  // namespace jax_ep
