// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/high_throughput/dispatch_kernel.h"
#include "csrc/kernels/launch.cuh"
#include "csrc/tuning/warps_and_stages.h"

namespace jax_ep {
namespace {

using Config = dev::DispatchConfig<kCompiledDispatch.num_warps,
                                   kCompiledDispatch.num_stages,
                                   kDispatchSegmentBytes>;
static_assert(sizeof(Config::SharedStorage) <= 227 * 1024);

template <typename RowType>
using ExpertKernel = dev::DispatchKernel<dev::DispatchExpertLayout<Config, RowType>>;
template <typename RowType>
using RankKernel = dev::DispatchKernel<dev::DispatchRankLayout<Config, RowType>>;

using Kernels = CompiledKernels<ExpertKernel, RankKernel, Config, DispatchParams>;

}  // namespace

int32_t shared_bytes_of_dispatch() { return sizeof(Config::SharedStorage); }

cudaError_t load_dispatch() { return Kernels::load(); }

cudaError_t launch_dispatch(const DispatchParams& params,
                            const LaunchShape& shape,
                            cudaStream_t stream) {
  if (products_of(params.op) != 0) return launch_dispatch_products(params, shape, stream);
  return Kernels::launch(params.op.dtype, params, shape, stream);
}

}  // namespace jax_ep
