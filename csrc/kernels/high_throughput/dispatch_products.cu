// SPDX-License-Identifier: Apache-2.0
// The dispatch that makes products, as a kernel of its own: it needs more registers than the one
// that only moves rows, and none of what FP8 needs.
#include "csrc/kernels/high_throughput/dispatch_kernel.h"
#include "csrc/kernels/launch.cuh"
#include "csrc/tuning/warps_and_stages.h"

namespace jax_ep {
namespace {

using Config = dev::DispatchConfig<kCompiledDispatch.num_warps,
                                   kCompiledDispatch.num_stages,
                                   kDispatchSegmentBytes,
                                   /*kMakesProducts=*/true>;

template <typename RowType>
using ExpertKernel = dev::DispatchKernel<dev::DispatchExpertLayout<Config, RowType>>;
template <typename RowType>
using RankKernel = dev::DispatchKernel<dev::DispatchRankLayout<Config, RowType>>;

using Kernels = CompiledKernels<ExpertKernel, RankKernel, Config, DispatchParams>;

}  // namespace

cudaError_t load_dispatch_products() { return Kernels::load(); }

cudaError_t launch_dispatch_products(const DispatchParams& params,
                                     const LaunchShape& shape,
                                     cudaStream_t stream) {
  return Kernels::launch(params.op.dtype, params, shape, stream);
}

}  // namespace jax_ep
