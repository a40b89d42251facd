// SPDX-License-Identifier: Apache-2.0
// The low-latency kernels, compiled for the simulator: with far ranks or without, and such that
// leave out who does not come.
#ifndef JAX_EP_CSRC_TESTING_SIMULATED_LOW_LATENCY_KERNELS_H_
#define JAX_EP_CSRC_TESTING_SIMULATED_LOW_LATENCY_KERNELS_H_

#include "csrc/kernels/low_latency/combine_kernel.h"
#include "csrc/kernels/low_latency/dispatch_kernel.h"
#include "csrc/testing/simulated_kernel.h"

namespace jax_ep {

template <typename Far, bool kMasks, typename Params>
SimulatedKernel simulated_low_latency_dispatch(const Params& params) {
  using Config = dev::LowLatencyDispatchConfig<3>;
  return simulated_kernel_of_dtype(params.op.dispatch.dtype, [&](auto row) -> SimulatedKernel {
    using RowType = typename decltype(row)::type;
    using dev::LowLatencyDispatchKernel, dev::PlanExpertLayout, dev::PlanRankLayout;
    if (shape_of(params.op).layout == Layout::kRank) {
      using Kernel = LowLatencyDispatchKernel<RowType, PlanRankLayout<Config>, Far, kMasks>;
      return simulated_kernel_of<Kernel, Config>(params);
    }
    using Kernel = LowLatencyDispatchKernel<RowType, PlanExpertLayout<Config>, Far, kMasks>;
    return simulated_kernel_of<Kernel, Config>(params);
  });
}

template <typename Far, bool kMasks, typename Params>
SimulatedKernel simulated_low_latency_combine(const Params& params) {
  using Config = dev::LowLatencyCombineConfig<3>;
  return simulated_kernel_of_dtype(params.op.dtype, [&](auto row) -> SimulatedKernel {
    using Context = dev::LowLatencyCombineContext<Config, typename decltype(row)::type, kMasks>;
    using dev::CombineExpertLayout, dev::CombineRankLayout, dev::LowLatencyCombineKernel;
    if (params.op.shape.layout == Layout::kRank) {
      using Kernel = LowLatencyCombineKernel<CombineRankLayout<Context>, Far>;
      return simulated_kernel_of<Kernel, Config>(params);
    }
    using Kernel = LowLatencyCombineKernel<CombineExpertLayout<Context>, Far>;
    return simulated_kernel_of<Kernel, Config>(params);
  });
}

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_TESTING_SIMULATED_LOW_LATENCY_KERNELS_H_
