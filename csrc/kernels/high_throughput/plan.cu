// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "csrc/kernels/high_throughput/plan_kernel.h"
#include "csrc/kernels/launch.cuh"

namespace jax_ep {
namespace {

// The tables of counts fill shared memory: many warps for few experts, few for many.
using FewBins = dev::PlanTile<16, kPlanFewBins>;
using ManyBins = dev::PlanTile<12, kMaxExperts + kMaxRanks>;
static_assert(sizeof(ManyBins::SharedStorage) <= 227 * 1024);

template <typename Tile>
using Kernel = dev::PlanKernel<Tile>;

}  // namespace

int32_t shared_bytes_of_plan() {
  return std::max<int32_t>(sizeof(FewBins::SharedStorage), sizeof(ManyBins::SharedStorage));
}

cudaError_t load_plan() {
  if (cudaError_t e = load_kernel<Kernel<FewBins>, FewBins, PlanParams>(); e != cudaSuccess)
    return e;
  return load_kernel<Kernel<ManyBins>, ManyBins, PlanParams>();
}

cudaError_t launch_plan(const PlanParams& params, const LaunchShape& shape, cudaStream_t stream) {
  const EpShape& ep = params.op.shape;
  const int32_t bins = num_bins(ep.layout, ep.num_experts, ep.num_ranks);
  if (shape.num_warps == FewBins::kWarps && bins <= FewBins::kMaxBins) {
    return launch_kernel<Kernel<FewBins>, FewBins>(params, shape, stream);
  }
  return launch_kernel<Kernel<ManyBins>, ManyBins>(params, shape, stream);
}

cudaError_t load_kernels() {
  if (cudaError_t e = load_plan(); e != cudaSuccess) return e;
  if (cudaError_t e = load_dispatch(); e != cudaSuccess) return e;
  return load_combine();
}

int32_t shared_bytes_per_block() {
  return std::max({shared_bytes_of_plan(), shared_bytes_of_dispatch(), shared_bytes_of_combine()});
}

}  // namespace jax_ep
