// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/launch.cuh"
#include "csrc/kernels/plan_kernel.h"

namespace jax_ep {
namespace {

// The tables of counts fill shared memory: many warps for few experts, few for many.
using FewBins = dev::PlanTile<16, 640>;
using ManyBins = dev::PlanTile<6, kMaxExperts + kMaxRanks>;
static_assert(sizeof(ManyBins::SharedStorage) <= 227 * 1024);

template <typename Tile>
using Kernel = dev::PlanKernel<Tile>;

}  // namespace

cudaError_t load_plan() {
  if (cudaError_t e = load_kernel<Kernel<FewBins>, FewBins, PlanParams>(); e != cudaSuccess)
    return e;
  return load_kernel<Kernel<ManyBins>, ManyBins, PlanParams>();
}

cudaError_t launch_plan(const PlanParams& params, int32_t num_blocks, cudaStream_t stream) {
  const EpShape& shape = params.shape;
  if (num_bins(shape.layout, shape.num_experts, shape.num_ranks) <= FewBins::kMaxBins) {
    return launch_kernel<Kernel<FewBins>, FewBins>(params, num_blocks, stream);
  }
  return launch_kernel<Kernel<ManyBins>, ManyBins>(params, num_blocks, stream);
}

cudaError_t load_kernels() {
  if (cudaError_t e = load_plan(); e != cudaSuccess) return e;
  if (cudaError_t e = load_dispatch(); e != cudaSuccess) return e;
  return load_combine();
}

}  // namespace jax_ep
