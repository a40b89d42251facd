// SPDX-License-Identifier: Apache-2.0
// The kernels' entry points for the host. Nothing here allocates, synchronizes or reads back, so
// every call can be captured in a CUDA graph and replayed.
#ifndef JAX_EP_CSRC_LAUNCH_LAUNCH_H_
#define JAX_EP_CSRC_LAUNCH_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "csrc/core/kernel_params.h"
#include "csrc/tuning/launch_shape.h"

namespace jax_ep {

// Loads every kernel onto the current device. Call it before the first launch: a kernel that is
// loaded lazily, while others of the group wait for it, can deadlock.
[[nodiscard]] cudaError_t load_kernels();

// Bytes of shared memory that a block of the most demanding kernel takes.
[[nodiscard]] int32_t shared_bytes_per_block();

// Each enqueues its kernel, whose blocks must all fit on the device at once (one block per SM).
// cudaErrorInvalidConfiguration: no kernel was compiled for these warps and stages.
[[nodiscard]] cudaError_t launch_plan(const PlanParams& params,
                                      const LaunchShape& shape,
                                      cudaStream_t stream);
[[nodiscard]] cudaError_t launch_dispatch(const DispatchParams& params,
                                          const LaunchShape& shape,
                                          cudaStream_t stream);
[[nodiscard]] cudaError_t launch_combine(const CombineParams& params,
                                         const LaunchShape& shape,
                                         cudaStream_t stream);

// A plan and its dispatch by one kernel. cudaErrorInvalidConfiguration also where
// plan_fits_in_dispatch (csrc/tuning/heuristics.h) is false.
[[nodiscard]] cudaError_t launch_plan_dispatch(const PlanDispatchParams& params,
                                               const LaunchShape& shape,
                                               cudaStream_t stream);

// The same, and a combine, by the low-latency kernels. cudaErrorInvalidConfiguration also where
// fits_low_latency (csrc/core/low_latency_fit.h) is false. Where the op has missing_ranks, the
// kernel leaves out who does not come; not in halves.
[[nodiscard]] cudaError_t launch_low_latency_dispatch(const PlanDispatchParams& params,
                                                      const LaunchShape& shape,
                                                      cudaStream_t stream);
[[nodiscard]] cudaError_t launch_low_latency_combine(const CombineParams& params,
                                                     const LaunchShape& shape,
                                                     cudaStream_t stream);

// The same between domains, where the network is mapped memory: for tests, and for domains that
// NVLink joins. Combine's domain_size must be the topology's.
struct LoopbackNetwork {
  NetworkView network;
  MappedHeaps heaps;
};
// Of PlanOp, DispatchOp and CombineOp.
template <typename Op>
[[nodiscard]] cudaError_t launch_over_loopback(const KernelParams<Op>& params,
                                               const LoopbackNetwork& network,
                                               const LaunchShape& shape,
                                               cudaStream_t stream);
// The same by the low-latency kernels, in one piece and with sums over any domains, of
// PlanDispatchOp and CombineOp. cudaErrorInvalidConfiguration also where fits_low_latency is false.
template <typename Op>
[[nodiscard]] cudaError_t launch_low_latency_over_loopback(const KernelParams<Op>& params,
                                                           const LoopbackNetwork& network,
                                                           const LaunchShape& shape,
                                                           cudaStream_t stream);
// Loads them onto the current device.
[[nodiscard]] cudaError_t load_loopback_kernels();

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_LAUNCH_LAUNCH_H_
