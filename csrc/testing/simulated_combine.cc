// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/high_throughput/combine_kernel.h"
#include "csrc/testing/simulated_kernel.h"

namespace jax_ep {
namespace {

using Config = dev::CombineConfig<3, 4, 1024>;

template <typename RowType>
SimulatedKernel kernel_of(CombineParams params) {
  using dev::CombineExpertLayout, dev::CombineKernel, dev::CombineRankLayout;
  params.num_senders = 1 + params.view.rank % 2;  // ranks need not agree
  if (params.op.shape.layout == Layout::kRank)
    return simulated_kernel_of<CombineKernel<CombineRankLayout<Config, RowType>>, Config>(params);
  return simulated_kernel_of<CombineKernel<CombineExpertLayout<Config, RowType>>, Config>(params);
}

}  // namespace

SimulatedKernel simulated_kernel(const CombineParams& params) {
  switch (params.op.dtype) {
    case DType::kFloat32: return kernel_of<dev::Float32Rows>(params);
    case DType::kBFloat16: return kernel_of<dev::BFloat16Rows>(params);
    case DType::kFloat16: return kernel_of<dev::Float16Rows>(params);
  }
  return {};
}

}  // namespace jax_ep
