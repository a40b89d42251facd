// SPDX-License-Identifier: Apache-2.0
// How a kernel class becomes a __global__ function and is launched; for the .cu files here.
#ifndef JAX_EP_CSRC_KERNELS_LAUNCH_CUH_
#define JAX_EP_CSRC_KERNELS_LAUNCH_CUH_

#include <cuda_runtime.h>

#include "csrc/kernels/launch.h"

namespace jax_ep {

// One block per SM: all blocks run at once, which their waits for each other rely on.
template <typename Kernel, typename Config, typename Params>
__global__ void __launch_bounds__(Config::kWarps * 32, 1)
    run_kernel(const __grid_constant__ Params params) {
  Kernel(params).run();
}

template <typename Kernel, typename Config, typename Params>
[[nodiscard]] cudaError_t load_kernel() {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(&run_kernel<Kernel, Config, Params>),
                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(sizeof(typename Config::SharedStorage)));
}

template <typename Kernel, typename Config, typename Params>
[[nodiscard]] cudaError_t launch_kernel(const Params& params,
                                        const LaunchShape& shape,
                                        cudaStream_t stream) {
  // A kernel with a pipeline moves rows: somebody has to send them.
  const bool sends = Config::kStages > 0;
  if (shape.num_warps != Config::kWarps || shape.num_stages != Config::kStages ||
      shape.num_senders < (sends ? 1 : 0) || shape.num_senders > (sends ? Config::kWarps : 0)) {
    return cudaErrorInvalidConfiguration;
  }
  Params launched = params;
  launched.num_senders = shape.num_senders;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(shape.num_blocks);
  config.blockDim = Config::kWarps * 32;
  config.dynamicSmemBytes = sizeof(typename Config::SharedStorage);
  config.stream = stream;
  void* arguments[] = {&launched};
  // Not <<<>>> and cudaGetLastError, which would report what an earlier call of this thread left
  // behind, after this kernel has been launched.
  return cudaLaunchKernelExC(
      &config, reinterpret_cast<const void*>(&run_kernel<Kernel, Config, Params>), arguments);
}

// What each kernel file loads.
[[nodiscard]] cudaError_t load_plan();
[[nodiscard]] cudaError_t load_dispatch();
[[nodiscard]] cudaError_t load_combine();

// Bytes of shared memory that a block of each takes.
[[nodiscard]] int32_t shared_bytes_of_plan();
[[nodiscard]] int32_t shared_bytes_of_dispatch();
[[nodiscard]] int32_t shared_bytes_of_combine();

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_KERNELS_LAUNCH_CUH_
