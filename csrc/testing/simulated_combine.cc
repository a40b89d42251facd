// SPDX-License-Identifier: Apache-2.0
#include "csrc/device/row_type_of.h"
#include "csrc/kernels/high_throughput/combine_kernel.h"
#include "csrc/testing/simulated_kernel.h"

namespace jax_ep {
namespace {

using Config = dev::CombineConfig<3, 4, 1024>;

template <typename RowType>
SimulatedKernel kernel_of(CombineParams params) {
  using dev::CombineExpertLayout, dev::CombineKernel, dev::CombineRankLayout;
  using Context = dev::CombineContext<Config, RowType>;
  params.num_senders = 1 + params.view.rank % 2;  // ranks need not agree
  if (params.op.shape.layout == Layout::kRank)
    return simulated_kernel_of<CombineKernel<CombineRankLayout<Context>>, Config>(params);
  return simulated_kernel_of<CombineKernel<CombineExpertLayout<Context>>, Config>(params);
}

}  // namespace

SimulatedKernel simulated_kernel(const CombineParams& params) {
  return with_row_type(params.op.dtype, SimulatedKernel{}, [&](auto row) {
    return kernel_of<typename decltype(row)::type>(params);
  });
}

}  // namespace jax_ep
