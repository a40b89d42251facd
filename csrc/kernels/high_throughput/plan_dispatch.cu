// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/high_throughput/plan_dispatch_kernel.h"
#include "csrc/kernels/launch.cuh"
#include "csrc/tuning/warps_and_stages.h"

namespace jax_ep {
namespace {

using Config = dev::DispatchConfig<kCompiledDispatch.num_warps,
                                   kCompiledDispatch.num_stages,
                                   kDispatchSegmentBytes>;
using PlanConfig = dev::PlanInDispatchConfig<Config>;
static_assert(PlanConfig::kMaxBins == kMaxPlanDispatchBins);

template <typename RowType>
using ExpertKernel = dev::PlanDispatchKernel<dev::DispatchExpertLayout<Config, RowType>,
                                             dev::PlanExpertLayout<PlanConfig>>;
template <typename RowType>
using RankKernel = dev::PlanDispatchKernel<dev::DispatchRankLayout<Config, RowType>,
                                           dev::PlanRankLayout<PlanConfig>>;

using Kernels = CompiledKernels<ExpertKernel, RankKernel, Config, PlanDispatchParams>;

}  // namespace

cudaError_t load_plan_dispatch() { return Kernels::load(); }

cudaError_t launch_plan_dispatch(const PlanDispatchParams& params,
                                 const LaunchShape& shape,
                                 cudaStream_t stream) {
  // Some warps must be left to make the plan, and have room for its bins.
  const EpShape& ep = shape_of(params.op);
  if (shape.num_senders >= Config::kWarps ||
      num_bins(ep.layout, ep.num_experts, ep.num_ranks) > PlanConfig::kMaxBins) {
    return cudaErrorInvalidConfiguration;
  }
  return Kernels::launch(params.op.dispatch.dtype, params, shape, stream);
}

}  // namespace jax_ep
