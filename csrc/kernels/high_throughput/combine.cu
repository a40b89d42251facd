// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/high_throughput/combine_kernel.h"
#include "csrc/kernels/launch.cuh"
#include "csrc/tuning/compiled_configs.h"

namespace jax_ep {
namespace {

using Config = dev::
    CombineConfig<kCompiledCombine.num_warps, kCompiledCombine.num_stages, kCombineSegmentBytes>;

static_assert(sizeof(Config::SharedStorage) <= 227 * 1024);

template <typename RowType>
using Kernel = dev::CombineKernel<Config, RowType>;

template <typename RowType>
cudaError_t load() {
  return load_kernel<Kernel<RowType>, Config, CombineParams>();
}

}  // namespace

int32_t shared_bytes_of_combine() { return sizeof(Config::SharedStorage); }

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
      return launch_kernel<Kernel<dev::Float32Rows>, Config>(params, shape, stream);
    case DType::kBFloat16:
      return launch_kernel<Kernel<dev::BFloat16Rows>, Config>(params, shape, stream);
    case DType::kFloat16:
      return launch_kernel<Kernel<dev::Float16Rows>, Config>(params, shape, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_ep
