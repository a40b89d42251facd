// SPDX-License-Identifier: Apache-2.0
#include "csrc/device/transport/loopback_transport.h"
#include "csrc/kernels/internode/compiled_kernels.cuh"

namespace jax_ep {
namespace {

using Compiled = CompiledInternodeDispatch<dev::LoopbackTransport>;

}  // namespace

cudaError_t load_loopback_dispatch() { return Compiled::load(); }

template <>
cudaError_t launch_over_loopback(const DispatchParams& params,
                                 const LoopbackNetwork& network,
                                 const LaunchShape& shape,
                                 cudaStream_t stream) {
  return Compiled::launch({params, network.network, {network.heaps}}, shape, stream);
}

}  // namespace jax_ep
