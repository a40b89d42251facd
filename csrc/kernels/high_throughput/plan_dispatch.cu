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

template <typename RowType>
cudaError_t load() {
  return load_layouts<ExpertKernel<RowType>, RankKernel<RowType>, Config, PlanDispatchParams>();
}

template <typename RowType>
cudaError_t launch(const PlanDispatchParams& params,
                   const LaunchShape& shape,
                   cudaStream_t stream) {
  return launch_layout<ExpertKernel<RowType>, RankKernel<RowType>, Config>(params, shape, stream);
}

}  // namespace

cudaError_t load_plan_dispatch() {
  return load_row_types([](auto row) { return load<typename decltype(row)::type>(); });
}

cudaError_t launch_plan_dispatch(const PlanDispatchParams& params,
                                 const LaunchShape& shape,
                                 cudaStream_t stream) {
  // Some warps must be left to make the plan, and have room for its bins.
  const EpShape& ep = shape_of(params.op);
  if (shape.num_senders >= Config::kWarps ||
      num_bins(ep.layout, ep.num_experts, ep.num_ranks) > PlanConfig::kMaxBins) {
    return cudaErrorInvalidConfiguration;
  }
  return with_row_type(params.op.dispatch.dtype, cudaErrorInvalidValue, [&](auto row) {
    return launch<typename decltype(row)::type>(params, shape, stream);
  });
}

}  // namespace jax_ep
