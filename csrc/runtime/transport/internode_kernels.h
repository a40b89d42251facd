// SPDX-License-Identifier: Apache-2.0
// The kernels between domains, as a rank of a group that spans some launches them: compiled for the
// transport that joins its domains, and with what that transport needs.
//
// One more transport is one more subclass, chosen in csrc/runtime/rank_context.cc, and in Python in
// jax_ep/_src/groups/domains.py. What RdmaLibrary (csrc/launch/rdma_library.h) can say needs but
// another library.
#ifndef JAX_EP_CSRC_RUNTIME_TRANSPORT_INTERNODE_KERNELS_H_
#define JAX_EP_CSRC_RUNTIME_TRANSPORT_INTERNODE_KERNELS_H_

#include <cuda_runtime_api.h>

#include "csrc/core/kernel_params.h"
#include "csrc/launch/launch.h"
#include "csrc/tuning/launch_shape.h"

namespace jax_ep {

// As the functions of csrc/launch/launch.h.
class InternodeKernels {
 public:
  InternodeKernels() = default;
  virtual ~InternodeKernels() = default;
  InternodeKernels(const InternodeKernels&) = delete;
  InternodeKernels& operator=(const InternodeKernels&) = delete;

  [[nodiscard]] virtual cudaError_t launch(const PlanParams& params,
                                           const LaunchShape& shape,
                                           cudaStream_t stream) const = 0;
  [[nodiscard]] virtual cudaError_t launch(const DispatchParams& params,
                                           const LaunchShape& shape,
                                           cudaStream_t stream) const = 0;
  [[nodiscard]] virtual cudaError_t launch(const CombineParams& params,
                                           const LaunchShape& shape,
                                           cudaStream_t stream) const = 0;

  // The low-latency ones.
  [[nodiscard]] virtual cudaError_t launch_low_latency(const PlanDispatchParams& params,
                                                       const LaunchShape& shape,
                                                       cudaStream_t stream) const = 0;
  [[nodiscard]] virtual cudaError_t launch_low_latency(const CombineParams& params,
                                                       const LaunchShape& shape,
                                                       cudaStream_t stream) const = 0;
};

// Where the network is memory that all ranks of the group map.
class LoopbackKernels final : public InternodeKernels {
 public:
  explicit LoopbackKernels(const LoopbackNetwork& network) : network_(network) {}

  [[nodiscard]] cudaError_t launch(const PlanParams& params,
                                   const LaunchShape& shape,
                                   cudaStream_t stream) const override {
    return launch_over_loopback(params, network_, shape, stream);
  }
  [[nodiscard]] cudaError_t launch(const DispatchParams& params,
                                   const LaunchShape& shape,
                                   cudaStream_t stream) const override {
    return launch_over_loopback(params, network_, shape, stream);
  }
  [[nodiscard]] cudaError_t launch(const CombineParams& params,
                                   const LaunchShape& shape,
                                   cudaStream_t stream) const override {
    return launch_over_loopback(params, network_, shape, stream);
  }
  [[nodiscard]] cudaError_t launch_low_latency(const PlanDispatchParams& params,
                                               const LaunchShape& shape,
                                               cudaStream_t stream) const override {
    return launch_low_latency_over_loopback(params, network_, shape, stream);
  }
  [[nodiscard]] cudaError_t launch_low_latency(const CombineParams& params,
                                               const LaunchShape& shape,
                                               cudaStream_t stream) const override {
    return launch_low_latency_over_loopback(params, network_, shape, stream);
  }

 private:
  LoopbackNetwork network_;
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_RUNTIME_TRANSPORT_INTERNODE_KERNELS_H_
