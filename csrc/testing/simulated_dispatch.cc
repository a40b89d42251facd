// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/high_throughput/dispatch_kernel.h"
#include "csrc/testing/simulated_kernel.h"

namespace jax_ep {
namespace {

template <typename RowType, typename Config>
SimulatedKernel kernel_of(const DispatchParams& params) {
  using dev::DispatchExpertLayout, dev::DispatchKernel, dev::DispatchRankLayout;
  if (params.op.shape.layout == Layout::kRank)
    return simulated_kernel_of<DispatchKernel<DispatchRankLayout<Config, RowType>>, Config>(params);
  return simulated_kernel_of<DispatchKernel<DispatchExpertLayout<Config, RowType>>, Config>(params);
}

template <typename RowType>
SimulatedKernel kernel_of(DispatchParams params) {
  params.num_senders = 1 + params.view.rank % 2;  // ranks need not agree
  if (products_of(params.op) != 0) {
    return kernel_of<RowType, dev::DispatchConfig<3, 3, 4096, true>>(params);
  }
  return kernel_of<RowType, dev::DispatchConfig<3, 3, 2048>>(params);
}

}  // namespace

SimulatedKernel simulated_kernel(const DispatchParams& params) {
  return simulated_kernel_of_dtype(
      params.op.dtype, [&](auto row) { return kernel_of<typename decltype(row)::type>(params); });
}

}  // namespace jax_ep
