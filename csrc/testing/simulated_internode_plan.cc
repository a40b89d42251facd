// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/internode/counts_plan_kernel.h"
#include "csrc/kernels/internode/plan_kernel.h"
#include "csrc/testing/simulated_internode.h"

namespace jax_ep {

using dev::SimulatedTransport;

SimulatedKernel simulated_internode_kernel(const SimulatedInternodeParams<PlanOp>& params) {
  using Config = dev::PlanConfig<2, 320>;
  using dev::CountsPlanKernel, dev::InternodePlanKernel, dev::PlanExpertLayout, dev::PlanRankLayout;
  if (plans_by_counts(params.network.layout)) {
    if (params.op.shape.layout == Layout::kRank) {
      using Kernel = CountsPlanKernel<PlanRankLayout<Config>, SimulatedTransport>;
      return simulated_kernel_of<Kernel, Config>(params);
    }
    using Kernel = CountsPlanKernel<PlanExpertLayout<Config>, SimulatedTransport>;
    return simulated_kernel_of<Kernel, Config>(params);
  }
  if (params.op.shape.layout == Layout::kRank) {
    using Kernel = InternodePlanKernel<PlanRankLayout<Config>, SimulatedTransport>;
    return simulated_kernel_of<Kernel, Config>(params);
  }
  using Kernel = InternodePlanKernel<PlanExpertLayout<Config>, SimulatedTransport>;
  return simulated_kernel_of<Kernel, Config>(params);
}

}  // namespace jax_ep
