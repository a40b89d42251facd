// SPDX-License-Identifier: Apache-2.0
#include "csrc/device/transport/loopback_transport.h"
#include "csrc/kernels/internode/compiled_kernels.cuh"

namespace jax_ep {
namespace {

using Compiled = CompiledLowLatencyDispatch<dev::LoopbackTransport>;

}  // namespace

cudaError_t load_loopback_low_latency_dispatch() { return Compiled::load(); }

template <>
cudaError_t launch_low_latency_over_loopback(const PlanDispatchParams& params,
                                             const LoopbackNetwork& network,
                                             const LaunchShape& shape,
                                             cudaStream_t stream) {
  return Compiled::launch({params, network.network, {network.heaps}}, shape, stream);
}

}  // namespace jax_ep
