// SPDX-License-Identifier: Apache-2.0
#include "csrc/device/transport/loopback_transport.h"
#include "csrc/kernels/internode/dispatch_kernel.h"
#include "csrc/kernels/launch.cuh"
#include "csrc/tuning/warps_and_stages.h"

namespace jax_ep {
namespace {

using dev::LoopbackTransport;
using Params = InternodeParams<DispatchOp, LoopbackTransport>;

template <bool kMakesProducts>
struct Compiled {
  using Config = dev::DispatchConfig<kCompiledInternodeDispatch.num_warps,
                                     kCompiledInternodeDispatch.num_stages,
                                     kDispatchSegmentBytes,
                                     kMakesProducts>;
  template <typename RowType>
  using ExpertKernel =
      dev::InternodeDispatchKernel<dev::DispatchExpertLayout<Config, RowType>, LoopbackTransport>;
  template <typename RowType>
  using RankKernel =
      dev::InternodeDispatchKernel<dev::DispatchRankLayout<Config, RowType>, LoopbackTransport>;
  using Kernels = CompiledKernels<ExpertKernel, RankKernel, Config, Params>;
};

}  // namespace

cudaError_t load_loopback_dispatch() {
  const cudaError_t error = Compiled<false>::Kernels::load();
  return error != cudaSuccess ? error : Compiled<true>::Kernels::load();
}

cudaError_t launch_over_loopback(const DispatchParams& params,
                                 const LoopbackNetwork& network,
                                 const LaunchShape& shape,
                                 cudaStream_t stream) {
  const Params launched{params, network.network, {network.heaps}};
  return products_of(params.op) != 0
             ? Compiled<true>::Kernels::launch(params.op.dtype, launched, shape, stream)
             : Compiled<false>::Kernels::launch(params.op.dtype, launched, shape, stream);
}

}  // namespace jax_ep
