// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/high_throughput/combine_kernel.h"
#include "csrc/kernels/launch.cuh"

namespace jax_ep {
namespace {

using Tile = dev::CombineTile<14, 2, 4, 64>;

template <typename Rows>
using Kernel = dev::CombineKernel<Tile, Rows>;

template <typename Rows>
cudaError_t load() {
  return load_kernel<Kernel<Rows>, Tile, CombineParams>();
}

}  // namespace

int32_t shared_bytes_of_combine() { return sizeof(Tile::SharedStorage); }

cudaError_t load_combine() {
  if (cudaError_t e = load<dev::Float32Rows>(); e != cudaSuccess) return e;
  if (cudaError_t e = load<dev::BFloat16Rows>(); e != cudaSuccess) return e;
  return load<dev::Float16Rows>();
}

cudaError_t launch_combine(const CombineParams& params,
                           const LaunchShape& shape,
                           cudaStream_t stream) {
  switch (params.op.dtype) {
    case DType::kFloat32:
      return launch_kernel<Kernel<dev::Float32Rows>, Tile>(params, shape, stream);
    case DType::kBFloat16:
      return launch_kernel<Kernel<dev::BFloat16Rows>, Tile>(params, shape, stream);
    case DType::kFloat16:
      return launch_kernel<Kernel<dev::Float16Rows>, Tile>(params, shape, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_ep
