// SPDX-License-Identifier: Apache-2.0
// The kernels of csrc/kernels/low_latency/combine.cu that leave out who does not come.
#include "csrc/kernels/launch.cuh"
#include "csrc/kernels/low_latency/combine_kernel.h"
#include "csrc/tuning/warps_and_stages.h"

namespace jax_ep {
namespace {

using Config = dev::LowLatencyCombineConfig<kCompiledLowLatencyCombine.num_warps>;
static_assert(Config::kStages == kCompiledLowLatencyCombine.num_stages);
static_assert(sizeof(Config::SharedStorage) <= 227 * 1024);

template <typename RowType>
using Context = dev::LowLatencyCombineContext<Config, RowType, true>;
template <typename RowType>
using ExpertKernel = dev::LowLatencyCombineKernel<dev::CombineExpertLayout<Context<RowType>>>;
template <typename RowType>
using RankKernel = dev::LowLatencyCombineKernel<dev::CombineRankLayout<Context<RowType>>>;

using Kernels = CompiledKernels<ExpertKernel, RankKernel, Config, CombineParams>;

}  // namespace

cudaError_t load_masking_combine() { return Kernels::load(); }

cudaError_t launch_masking_combine(const CombineParams& params,
                                   const LaunchShape& shape,
                                   cudaStream_t stream) {
  if (params.half != Half::kBoth) return cudaErrorInvalidConfiguration;
  return Kernels::launch(params.op.dtype, params, shape, stream);
}

}  // namespace jax_ep
