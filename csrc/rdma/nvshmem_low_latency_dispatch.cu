// SPDX-License-Identifier: Apache-2.0
#include "csrc/device/transport/nvshmem_transport.h"
#include "csrc/kernels/internode/compiled_kernels.cuh"
#include "csrc/rdma/nvshmem_kernels.h"

namespace jax_ep {
namespace {

using Compiled = CompiledLowLatencyDispatch<dev::NvshmemTransport>;

}  // namespace

cudaError_t load_nvshmem_low_latency_dispatch() { return Compiled::load(); }

template <>
cudaError_t launch_low_latency_over_nvshmem(const PlanDispatchParams& params,
                                            const RdmaNetwork& network,
                                            const LaunchShape& shape,
                                            cudaStream_t stream) {
  return Compiled::launch({params, network.network, {network.heaps}}, shape, stream);
}

}  // namespace jax_ep
