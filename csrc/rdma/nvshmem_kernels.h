// SPDX-License-Identifier: Apache-2.0
// The kernels between domains over NVSHMEM. They are in this library alone: NVSHMEM's device
// code knows only kernels of the library that has initialized it.
#ifndef JAX_EP_CSRC_RDMA_NVSHMEM_KERNELS_H_
#define JAX_EP_CSRC_RDMA_NVSHMEM_KERNELS_H_

#include <cuda_runtime_api.h>

#include "csrc/launch/rdma_library.h"

namespace jax_ep {

[[nodiscard]] cudaError_t load_nvshmem_plan();
[[nodiscard]] cudaError_t load_nvshmem_dispatch();
[[nodiscard]] cudaError_t load_nvshmem_combine();
[[nodiscard]] cudaError_t load_nvshmem_low_latency_dispatch();
[[nodiscard]] cudaError_t load_nvshmem_low_latency_combine();

// As those of csrc/launch/launch.h over loopback.
template <typename Op>
[[nodiscard]] cudaError_t launch_over_nvshmem(const KernelParams<Op>& params,
                                              const RdmaNetwork& network,
                                              const LaunchShape& shape,
                                              cudaStream_t stream);
template <typename Op>
[[nodiscard]] cudaError_t launch_low_latency_over_nvshmem(const KernelParams<Op>& params,
                                                          const RdmaNetwork& network,
                                                          const LaunchShape& shape,
                                                          cudaStream_t stream);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_RDMA_NVSHMEM_KERNELS_H_
