// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/high_throughput/plan_kernel.h"
#include "csrc/testing/simulated_kernel.h"

namespace jax_ep {

SimulatedKernel simulated_kernel(const PlanParams& params) {
  using Config = dev::PlanConfig<2, 320>;
  return simulated_kernel_of<dev::PlanKernel<Config>, Config>(params);
}

}  // namespace jax_ep
