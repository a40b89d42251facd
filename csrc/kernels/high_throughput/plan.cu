// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "csrc/kernels/high_throughput/plan_kernel.h"
#include "csrc/kernels/launch.cuh"
#include "csrc/tuning/warps_and_stages.h"

namespace jax_ep {
namespace {

// The tables of counts fill shared memory: many warps for few experts, few for many.
using FewBins = dev::PlanConfig<kCompiledPlans[0].num_warps, kCompiledPlans[0].max_bins>;
using ManyBins = dev::PlanConfig<kCompiledPlans[1].num_warps, kCompiledPlans[1].max_bins>;
static_assert(sizeof(ManyBins::SharedStorage) <= 227 * 1024);

template <typename Config>
using ExpertKernel = dev::PlanKernel<dev::PlanExpertLayout<Config>>;
template <typename Config>
using RankKernel = dev::PlanKernel<dev::PlanRankLayout<Config>>;

template <typename Config>
cudaError_t load() {
  return load_layouts<ExpertKernel<Config>, RankKernel<Config>, Config, PlanParams>();
}

template <typename Config>
cudaError_t launch(const PlanParams& params, const LaunchShape& shape, cudaStream_t stream) {
  return launch_layout<ExpertKernel<Config>, RankKernel<Config>, Config>(params, shape, stream);
}

}  // namespace

int32_t shared_bytes_of_plan() {
  return std::max<int32_t>(sizeof(FewBins::SharedStorage), sizeof(ManyBins::SharedStorage));
}

cudaError_t load_plan() {
  if (cudaError_t e = load<FewBins>(); e != cudaSuccess) return e;
  return load<ManyBins>();
}

cudaError_t launch_plan(const PlanParams& params, const LaunchShape& shape, cudaStream_t stream) {
  const EpShape& ep = params.op.shape;
  const int32_t bins = num_bins(ep.layout, ep.num_experts, ep.num_ranks);
  if (shape.num_warps == FewBins::kWarps && bins <= FewBins::kMaxBins) {
    return launch<FewBins>(params, shape, stream);
  }
  return launch<ManyBins>(params, shape, stream);
}

}  // namespace jax_ep
