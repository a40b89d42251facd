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

[[nodiscard]] cudaError_t launch_over_nvshmem(const PlanParams& params,
                                              const RdmaNetwork& network,
                                              const LaunchShape& shape,
                                              cudaStream_t stream);
[[nodiscard]] cudaError_t launch_over_nvshmem(const DispatchParams& params,
                                              const RdmaNetwork& network,
                                              const LaunchShape& shape,
                                              cudaStream_t stream);
[[nodiscard]] cudaError_t launch_over_nvshmem(const CombineParams& params,
                                              const RdmaNetwork& network,
                                              const LaunchShape& shape,
                                              cudaStream_t stream);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_RDMA_NVSHMEM_KERNELS_H_
