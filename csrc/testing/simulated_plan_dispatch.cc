// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/high_throughput/plan_dispatch_kernel.h"
#include "csrc/testing/simulated_kernel.h"

namespace jax_ep {
namespace {

using Config = dev::DispatchConfig<3, 3, 2048>;
using PlanConfig = dev::PlanInDispatchConfig<Config>;

template <typename RowType>
SimulatedKernel kernel_of(PlanDispatchParams params) {
  params.num_senders = 1 + params.view.rank % 2;  // ranks need not agree
  if (shape_of(params.op).layout == Layout::kRank) {
    using Kernel = dev::PlanDispatchKernel<dev::DispatchRankLayout<Config, RowType>,
                                           dev::PlanRankLayout<PlanConfig>>;
    return simulated_kernel_of<Kernel, Config>(params);
  }
  using Kernel = dev::PlanDispatchKernel<dev::DispatchExpertLayout<Config, RowType>,
                                         dev::PlanExpertLayout<PlanConfig>>;
  return simulated_kernel_of<Kernel, Config>(params);
}

}  // namespace

SimulatedKernel simulated_kernel(const PlanDispatchParams& params) {
  return simulated_kernel_of_dtype(params.op.dispatch.dtype, [&](auto row) {
    return kernel_of<typename decltype(row)::type>(params);
  });
}

}  // namespace jax_ep
