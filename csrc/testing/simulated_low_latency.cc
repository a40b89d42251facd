// SPDX-License-Identifier: Apache-2.0
#include "csrc/testing/simulated_low_latency_kernels.h"

namespace jax_ep {

SimulatedKernel simulated_low_latency_kernel(const PlanDispatchParams& params) {
  return simulated_low_latency_dispatch<dev::NoFarRanks, false>(params);
}

SimulatedKernel simulated_low_latency_kernel(const CombineParams& params) {
  return simulated_low_latency_combine<dev::NoFarRanks, false>(params);
}

}  // namespace jax_ep
