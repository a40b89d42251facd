// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/internode/dispatch_kernel.h"
#include "csrc/testing/simulated_internode.h"

namespace jax_ep {
namespace {

using dev::SimulatedTransport;

template <typename RowType, typename Config>
SimulatedKernel kernel_of(const SimulatedInternodeParams<DispatchOp>& params) {
  using dev::DispatchExpertLayout, dev::DispatchRankLayout, dev::InternodeDispatchKernel;
  if (params.op.shape.layout == Layout::kRank) {
    using RowLayout = DispatchRankLayout<Config, RowType>;
    return simulated_kernel_of<InternodeDispatchKernel<RowLayout, SimulatedTransport>, Config>(
        params);
  }
  using RowLayout = DispatchExpertLayout<Config, RowType>;
  return simulated_kernel_of<InternodeDispatchKernel<RowLayout, SimulatedTransport>, Config>(
      params);
}

}  // namespace

SimulatedKernel simulated_internode_kernel(const SimulatedInternodeParams<DispatchOp>& params) {
  return simulated_kernel_of_dtype(params.op.dtype, [&](auto row) {
    using RowType = typename decltype(row)::type;
    if (products_of(params.op) != 0) {
      return kernel_of<RowType, dev::DispatchConfig<5, 3, 4096, true>>(params);
    }
    return kernel_of<RowType, dev::DispatchConfig<5, 3, 2048>>(params);
  });
}

}  // namespace jax_ep
