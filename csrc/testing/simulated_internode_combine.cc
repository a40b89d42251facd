// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/internode/combine_kernel.h"
#include "csrc/testing/simulated_internode.h"

namespace jax_ep {
namespace {

using dev::SimulatedTransport;

template <typename RowType>
SimulatedKernel kernel_of(const SimulatedInternodeParams<CombineOp>& params) {
  using Config = dev::CombineConfig<4, 4, 1024, true>;
  using dev::CombineExpertLayout, dev::CombineRankLayout, dev::InternodeCombineKernel;
  using Context = dev::CombineContext<Config, RowType>;
  if (params.op.shape.layout == Layout::kRank) {
    using RowLayout = CombineRankLayout<Context>;
    return simulated_kernel_of<InternodeCombineKernel<RowLayout, SimulatedTransport>, Config>(
        params);
  }
  using RowLayout = CombineExpertLayout<Context>;
  return simulated_kernel_of<InternodeCombineKernel<RowLayout, SimulatedTransport>, Config>(params);
}

}  // namespace

SimulatedKernel simulated_internode_kernel(const SimulatedInternodeParams<CombineOp>& params) {
  return simulated_kernel_of_dtype(
      params.op.dtype, [&](auto row) { return kernel_of<typename decltype(row)::type>(params); });
}

}  // namespace jax_ep
