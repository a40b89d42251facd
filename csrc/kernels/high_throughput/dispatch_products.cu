// SPDX-License-Identifier: Apache-2.0
// The dispatch that makes products, as a kernel of its own: it needs more registers than the one
// that only moves rows, and none of what FP8 needs.
#include "csrc/kernels/high_throughput/dispatch_kernel.h"
#include "csrc/kernels/launch.cuh"
#include "csrc/tuning/compiled_configs.h"

namespace jax_ep {
namespace {

using Config = dev::DispatchConfig<kCompiledDispatch.num_warps,
                                   kCompiledDispatch.num_stages,
                                   kDispatchSegmentBytes,
                                   /*kMakesProducts=*/true>;

template <typename RowType>
using Kernel = dev::DispatchKernel<Config, RowType>;

template <typename RowType>
cudaError_t load() {
  return load_kernel<Kernel<RowType>, Config, DispatchParams>();
}

}  // namespace

cudaError_t load_dispatch_products() {
  if (cudaError_t e = load<dev::Float32Rows>(); e != cudaSuccess) return e;
  if (cudaError_t e = load<dev::BFloat16Rows>(); e != cudaSuccess) return e;
  return load<dev::Float16Rows>();
}

cudaError_t launch_dispatch_products(const DispatchParams& params,
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
