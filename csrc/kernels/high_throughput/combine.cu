// SPDX-License-Identifier: Apache-2.0
#include "csrc/kernels/high_throughput/combine_kernel.h"
#include "csrc/kernels/launch.cuh"
#include "csrc/tuning/warps_and_stages.h"

namespace jax_ep {
namespace {

using Config = dev::CombineConfig<kCompiledCombine.num_warps,
                                  kCompiledCombine.num_stages,
                                  kCombineSegmentBytes,
                                  /*kSumsOverDomains=*/false>;

static_assert(sizeof(Config::SharedStorage) <= 227 * 1024);

template <typename RowType>
using ExpertKernel =
    dev::CombineKernel<dev::CombineExpertLayout<dev::CombineContext<Config, RowType>>>;
template <typename RowType>
using RankKernel = dev::CombineKernel<dev::CombineRankLayout<dev::CombineContext<Config, RowType>>>;

template <typename RowType>
cudaError_t load() {
  return load_layouts<ExpertKernel<RowType>, RankKernel<RowType>, Config, CombineParams>();
}

template <typename RowType>
cudaError_t launch(const CombineParams& params, const LaunchShape& shape, cudaStream_t stream) {
  return launch_layout<ExpertKernel<RowType>, RankKernel<RowType>, Config>(params, shape, stream);
}

}  // namespace

int32_t shared_bytes_of_combine() { return sizeof(Config::SharedStorage); }

cudaError_t load_combine() {
  return load_row_types([](auto row) { return load<typename decltype(row)::type>(); });
}

cudaError_t launch_combine(const CombineParams& params,
                           const LaunchShape& shape,
                           cudaStream_t stream) {
  if (sums_over_domains(params.op)) return launch_combine_domains(params, shape, stream);
  return with_row_type(params.op.dtype, cudaErrorInvalidValue, [&](auto row) {
    return launch<typename decltype(row)::type>(params, shape, stream);
  });
}

}  // namespace jax_ep
