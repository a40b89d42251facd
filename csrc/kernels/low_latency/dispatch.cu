// SPDX-License-Identifier: Apache-2.0
// Where else an operation is named: CONTRIBUTING.md, "Another operation".
#include "csrc/core/low_latency_fit.h"
#include "csrc/kernels/launch.cuh"
#include "csrc/kernels/low_latency/dispatch_kernel.h"
#include "csrc/tuning/warps_and_stages.h"

namespace jax_ep {
namespace {

using Config = dev::LowLatencyDispatchConfig<kCompiledLowLatencyDispatch.num_warps>;
static_assert(Config::kStages == kCompiledLowLatencyDispatch.num_stages);
static_assert(sizeof(Config::SharedStorage) <= 227 * 1024);

template <typename RowType>
using ExpertKernel = dev::LowLatencyDispatchKernel<RowType, dev::PlanExpertLayout<Config>>;
template <typename RowType>
using RankKernel = dev::LowLatencyDispatchKernel<RowType, dev::PlanRankLayout<Config>>;

using Kernels = CompiledKernels<ExpertKernel, RankKernel, Config, PlanDispatchParams>;

}  // namespace

int32_t shared_bytes_of_low_latency_dispatch() { return sizeof(Config::SharedStorage); }

cudaError_t load_low_latency_dispatch() { return Kernels::load(); }

cudaError_t launch_low_latency_dispatch(const PlanDispatchParams& params,
                                        const LaunchShape& shape,
                                        cudaStream_t stream) {
  if (!fits_low_latency(params.view.layout, params.op)) return cudaErrorInvalidConfiguration;
  if (missing_ranks_of(params.op) != nullptr) {
    return launch_masking_dispatch(params, shape, stream);
  }
  return Kernels::launch(params.op.dispatch.dtype, params, shape, stream);
}

}  // namespace jax_ep
