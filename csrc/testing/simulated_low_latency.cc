// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/low_latency/combine_kernel.h"
#include "csrc/kernels/low_latency/dispatch_kernel.h"
#include "csrc/testing/simulated_kernel.h"

namespace jax_ep {
namespace {

using DispatchConfig = dev::LowLatencyDispatchConfig<3>;
using CombineConfig = dev::LowLatencyCombineConfig<3>;

template <typename RowType>
SimulatedKernel kernel_of(const PlanDispatchParams& params) {
  using dev::LowLatencyDispatchKernel, dev::PlanExpertLayout, dev::PlanRankLayout;
  if (shape_of(params.op).layout == Layout::kRank) {
    using Kernel = LowLatencyDispatchKernel<RowType, PlanRankLayout<DispatchConfig>>;
    return simulated_kernel_of<Kernel, DispatchConfig>(params);
  }
  using Kernel = LowLatencyDispatchKernel<RowType, PlanExpertLayout<DispatchConfig>>;
  return simulated_kernel_of<Kernel, DispatchConfig>(params);
}

template <typename RowType>
SimulatedKernel kernel_of(const CombineParams& params) {
  using dev::CombineExpertLayout, dev::CombineRankLayout, dev::LowLatencyCombineKernel;
  using Context = dev::LowLatencyCombineContext<CombineConfig, RowType>;
  if (params.op.shape.layout == Layout::kRank) {
    using Kernel = LowLatencyCombineKernel<CombineRankLayout<Context>>;
    return simulated_kernel_of<Kernel, CombineConfig>(params);
  }
  using Kernel = LowLatencyCombineKernel<CombineExpertLayout<Context>>;
  return simulated_kernel_of<Kernel, CombineConfig>(params);
}

}  // namespace

SimulatedKernel simulated_low_latency_kernel(const PlanDispatchParams& params) {
  return simulated_kernel_of_dtype(params.op.dispatch.dtype, [&](auto row) {
    return kernel_of<typename decltype(row)::type>(params);
  });
}

SimulatedKernel simulated_low_latency_kernel(const CombineParams& params) {
  return simulated_kernel_of_dtype(
      params.op.dtype, [&](auto row) { return kernel_of<typename decltype(row)::type>(params); });
}

}  // namespace jax_ep
