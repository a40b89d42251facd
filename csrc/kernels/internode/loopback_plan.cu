// SPDX-License-Identifier: Apache-2.0
#include "csrc/device/transport/loopback_transport.h"
#include "csrc/kernels/internode/plan_kernel.h"
#include "csrc/kernels/launch.cuh"
#include "csrc/tuning/warps_and_stages.h"

namespace jax_ep {
namespace {

using dev::LoopbackTransport;
using Params = InternodeParams<PlanOp, LoopbackTransport>;
// With the tables of many experts: a group of several domains has many.
using Config = dev::PlanConfig<kCompiledPlans[1].num_warps, kCompiledPlans[1].max_bins>;
using ExpertKernel = dev::InternodePlanKernel<dev::PlanExpertLayout<Config>, LoopbackTransport>;
using RankKernel = dev::InternodePlanKernel<dev::PlanRankLayout<Config>, LoopbackTransport>;

}  // namespace

cudaError_t load_loopback_plan() {
  return load_layouts<ExpertKernel, RankKernel, Config, Params>();
}

cudaError_t launch_over_loopback(const PlanParams& params,
                                 const LoopbackNetwork& network,
                                 const LaunchShape& shape,
                                 cudaStream_t stream) {
  return launch_layout<ExpertKernel, RankKernel, Config>(
      Params{params, network.network, {network.heaps}}, shape, stream);
}

// Here, so that nothing has the kernels over loopback that does not launch them.
cudaError_t load_loopback_kernels() {
  if (cudaError_t e = load_loopback_plan(); e != cudaSuccess) return e;
  if (cudaError_t e = load_loopback_dispatch(); e != cudaSuccess) return e;
  return load_loopback_combine();
}

}  // namespace jax_ep
