// SPDX-License-Identifier: Apache-2.0
#include "csrc/device/transport/loopback_transport.h"
#include "csrc/kernels/internode/combine_kernel.h"
#include "csrc/kernels/launch.cuh"
#include "csrc/tuning/warps_and_stages.h"

namespace jax_ep {
namespace {

using dev::LoopbackTransport;
using Params = InternodeParams<CombineOp, LoopbackTransport>;
using Config = dev::CombineConfig<kCompiledInternodeCombine.num_warps,
                                  kCompiledInternodeCombine.num_stages,
                                  kCombineSegmentBytes,
                                  /*kSumsOverDomains=*/true>;

template <typename RowType>
using Context = dev::CombineContext<Config, RowType>;
template <typename RowType>
using ExpertKernel =
    dev::InternodeCombineKernel<dev::CombineExpertLayout<Context<RowType>>, LoopbackTransport>;
template <typename RowType>
using RankKernel =
    dev::InternodeCombineKernel<dev::CombineRankLayout<Context<RowType>>, LoopbackTransport>;
using Kernels = CompiledKernels<ExpertKernel, RankKernel, Config, Params>;

}  // namespace

cudaError_t load_loopback_combine() { return Kernels::load(); }

cudaError_t launch_over_loopback(const CombineParams& params,
                                 const LoopbackNetwork& network,
                                 const LaunchShape& shape,
                                 cudaStream_t stream) {
  return Kernels::launch(
      params.op.dtype, Params{params, network.network, {network.heaps}}, shape, stream);
}

}  // namespace jax_ep
