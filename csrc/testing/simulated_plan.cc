// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/high_throughput/plan_kernel.h"
#include "csrc/testing/simulated_kernel.h"

namespace jax_ep {

SimulatedKernel simulated_kernel(const PlanParams& params) {
  using Config = dev::PlanConfig<2, 320>;
  if (params.op.shape.layout == Layout::kRank)
    return simulated_kernel_of<dev::PlanKernel<dev::PlanRankLayout<Config>>, Config>(params);
  return simulated_kernel_of<dev::PlanKernel<dev::PlanExpertLayout<Config>>, Config>(params);
}

}  // namespace jax_ep
