// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/high_throughput/dispatch_kernel.h"
#include "csrc/kernels/launch.cuh"
#include "csrc/tuning/compiled_configs.h"

namespace jax_ep {
namespace {

using Config = dev::DispatchConfig<kCompiledDispatch.num_warps,
                                   kCompiledDispatch.num_stages,
                                   kDispatchSegmentBytes>;
static_assert(sizeof(Config::SharedStorage) <= 227 * 1024);

template <typename RowType>
using Kernel = dev::DispatchKernel<Config, RowType>;

template <typename RowType>
cudaError_t load() {
  return load_kernel<Kernel<RowType>, Config, DispatchParams>();
}

}  // namespace

int32_t shared_bytes_of_dispatch() { return sizeof(Config::SharedStorage); }

cudaError_t load_dispatch() {
  if (cudaError_t e = load<dev::Float32Rows>(); e != cudaSuccess) return e;
  if (cudaError_t e = load<dev::BFloat16Rows>(); e != cudaSuccess) return e;
  return load<dev::Float16Rows>();
}

cudaError_t launch_dispatch(const DispatchParams& params,
                            const LaunchShape& shape,
                            cudaStream_t stream) {
  if (products_of(params.op) != 0) return launch_dispatch_products(params, shape, stream);
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
