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

using Kernels = CompiledKernels<ExpertKernel, RankKernel, Config, CombineParams>;

}  // namespace

int32_t shared_bytes_of_combine() { return sizeof(Config::SharedStorage); }

cudaError_t load_combine() { return Kernels::load(); }

cudaError_t launch_combine(const CombineParams& params,
                           const LaunchShape& shape,
                           cudaStream_t stream) {
  if (sums_over_domains(params.op)) return launch_combine_domains(params, shape, stream);
  return Kernels::launch(params.op.dtype, params, shape, stream);
}

}  // namespace jax_ep
