// SPDX-License-Identifier: Apache-2.0
#include "csrc/device/transport/loopback_transport.h"
#include "csrc/kernels/internode/compiled_kernels.cuh"

namespace jax_ep {
namespace {

using Compiled = CompiledInternodePlan<dev::LoopbackTransport>;

}  // namespace

cudaError_t load_loopback_plan() { return Compiled::load(); }

template <>
cudaError_t launch_over_loopback(const PlanParams& params,
                                 const LoopbackNetwork& network,
                                 const LaunchShape& shape,
                                 cudaStream_t stream) {
  return Compiled::launch({params, network.network, {network.heaps}}, shape, stream);
}

// Here, so that nothing has the kernels over loopback that does not launch them.
cudaError_t load_loopback_kernels() {
  if (cudaError_t e = load_loopback_plan(); e != cudaSuccess) return e;
  if (cudaError_t e = load_loopback_dispatch(); e != cudaSuccess) return e;
  if (cudaError_t e = load_loopback_combine(); e != cudaSuccess) return e;
  if (cudaError_t e = load_loopback_low_latency_dispatch(); e != cudaSuccess) return e;
  return load_loopback_low_latency_combine();
}

}  // namespace jax_ep
