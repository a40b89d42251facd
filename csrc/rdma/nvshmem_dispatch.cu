// SPDX-License-Identifier: Apache-2.0
#include "csrc/device/transport/nvshmem_transport.h"
#include "csrc/kernels/internode/compiled_kernels.cuh"
#include "csrc/rdma/nvshmem_kernels.h"

namespace jax_ep {
namespace {

using Compiled = CompiledInternodeDispatch<dev::NvshmemTransport>;

}  // namespace

cudaError_t load_nvshmem_dispatch() { return Compiled::load(); }

template <>
cudaError_t launch_over_nvshmem(const DispatchParams& params,
                                const RdmaNetwork& network,
                                const LaunchShape& shape,
                                cudaStream_t stream) {
  return Compiled::launch({params, network.network, {network.heaps}}, shape, stream);
}

}  // namespace jax_ep
