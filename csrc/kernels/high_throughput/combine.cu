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
cudaError_t load() {
  using dev::CombineExpertLayout, dev::CombineKernel, dev::CombineRankLayout;
  if (cudaError_t e =
          load_kernel<CombineKernel<CombineExpertLayout<Config, RowType>>, Config, CombineParams>();
      e != cudaSuccess)
    return e;
  return load_kernel<CombineKernel<CombineRankLayout<Config, RowType>>, Config, CombineParams>();
}

template <typename RowType>
cudaError_t launch(const CombineParams& params, const LaunchShape& shape, cudaStream_t stream) {
  using dev::CombineExpertLayout, dev::CombineKernel, dev::CombineRankLayout;
  switch (params.op.shape.layout) {
    case Layout::kExpert:
      return launch_kernel<CombineKernel<CombineExpertLayout<Config, RowType>>, Config>(
          params, shape, stream);
    case Layout::kRank:
      return launch_kernel<CombineKernel<CombineRankLayout<Config, RowType>>, Config>(
          params, shape, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int32_t shared_bytes_of_combine() { return sizeof(Config::SharedStorage); }

cudaError_t load_combine() {
  return load_row_types([](auto row) { return load<typename decltype(row)::type>(); });
}

cudaError_t launch_combine(const CombineParams& params,
                           const LaunchShape& shape,
                           cudaStream_t stream) {
  return with_row_type(params.op.dtype, cudaErrorInvalidValue, [&](auto row) {
    return launch<typename decltype(row)::type>(params, shape, stream);
  });
}

}  // namespace jax_ep
