// SPDX-License-Identifier: Apache-2.0
// The kernels of csrc/kernels/low_latency/dispatch.cu that leave out who does not come.
#include "csrc/kernels/launch.cuh"
#include "csrc/kernels/low_latency/dispatch_kernel.h"
#include "csrc/tuning/warps_and_stages.h"

namespace jax_ep {
namespace {

using Config = dev::LowLatencyDispatchConfig<kCompiledLowLatencyDispatch.num_warps>;
static_assert(Config::kStages == kCompiledLowLatencyDispatch.num_stages);
static_assert(sizeof(Config::SharedStorage) <= 227 * 1024);

template <typename RowType>
using ExpertKernel =
    dev::LowLatencyDispatchKernel<RowType, dev::PlanExpertLayout<Config>, dev::NoFarRanks, true>;
template <typename RowType>
using RankKernel =
    dev::LowLatencyDispatchKernel<RowType, dev::PlanRankLayout<Config>, dev::NoFarRanks, true>;

using Kernels = CompiledKernels<ExpertKernel, RankKernel, Config, PlanDispatchParams>;

}  // namespace

cudaError_t load_masking_dispatch() { return Kernels::load(); }

cudaError_t launch_masking_dispatch(const PlanDispatchParams& params,
                                    const LaunchShape& shape,
                                    cudaStream_t stream) {
  if (params.half != Half::kBoth) return cudaErrorInvalidConfiguration;
  return Kernels::launch(params.op.dispatch.dtype, params, shape, stream);
}

}  // namespace jax_ep
