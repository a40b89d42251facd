// SPDX-License-Identifier: Apache-2.0
#include "csrc/testing/simulated_low_latency_kernels.h"

namespace jax_ep {

SimulatedKernel simulated_masking_kernel(const PlanDispatchParams& params) {
  return simulated_low_latency_dispatch<dev::NoFarRanks, true>(params);
}

SimulatedKernel simulated_masking_kernel(const CombineParams& params) {
  return simulated_low_latency_combine<dev::NoFarRanks, true>(params);
}

}  // namespace jax_ep
