// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "csrc/kernels/launch.cuh"

namespace jax_ep {

cudaError_t load_kernels() {
  if (cudaError_t e = load_plan(); e != cudaSuccess) return e;
  if (cudaError_t e = load_dispatch(); e != cudaSuccess) return e;
  if (cudaError_t e = load_dispatch_products(); e != cudaSuccess) return e;
  if (cudaError_t e = load_combine(); e != cudaSuccess) return e;
  if (cudaError_t e = load_combine_domains(); e != cudaSuccess) return e;
  if (cudaError_t e = load_plan_dispatch(); e != cudaSuccess) return e;
  if (cudaError_t e = load_low_latency_dispatch(); e != cudaSuccess) return e;
  if (cudaError_t e = load_low_latency_combine(); e != cudaSuccess) return e;
  if (cudaError_t e = load_masking_dispatch(); e != cudaSuccess) return e;
  return load_masking_combine();
}

int32_t shared_bytes_per_block() {
  return std::max({shared_bytes_of_plan(),
                   shared_bytes_of_dispatch(),
                   shared_bytes_of_combine(),
                   shared_bytes_of_low_latency_dispatch(),
                   shared_bytes_of_low_latency_combine()});
}

}  // namespace jax_ep
