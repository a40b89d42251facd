// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/high_throughput/combine_kernel.h"
#include "csrc/testing/simulated_kernel.h"

namespace jax_ep {
namespace {

template <typename RowType, bool kByDomain>
SimulatedKernel kernel_of(CombineParams params) {
  using Config = dev::CombineConfig<3, 4, 1024, kByDomain>;
  using dev::CombineExpertLayout, dev::CombineKernel, dev::CombineRankLayout;
  using Context = dev::CombineContext<Config, RowType>;
  params.num_senders = 1 + params.view.rank % 2;  // ranks need not agree
  if (params.op.shape.layout == Layout::kRank)
    return simulated_kernel_of<CombineKernel<CombineRankLayout<Context>>, Config>(params);
  return simulated_kernel_of<CombineKernel<CombineExpertLayout<Context>>, Config>(params);
}

}  // namespace

SimulatedKernel simulated_kernel(const CombineParams& params) {
  return simulated_kernel_of_dtype(params.op.dtype, [&](auto row) {
    using RowType = typename decltype(row)::type;
    return sums_over_domains(params.op) ? kernel_of<RowType, true>(params)
                                        : kernel_of<RowType, false>(params);
  });
}

}  // namespace jax_ep
