// SPDX-License-Identifier: Apache-2.0
// Where else an operation is named: CONTRIBUTING.md, "Another operation".
#include "csrc/core/low_latency_fit.h"
#include "csrc/kernels/launch.cuh"
#include "csrc/kernels/low_latency/combine_kernel.h"
#include "csrc/tuning/warps_and_stages.h"

namespace jax_ep {
namespace {

using Config = dev::LowLatencyCombineConfig<kCompiledLowLatencyCombine.num_warps>;
static_assert(Config::kStages == kCompiledLowLatencyCombine.num_stages);
static_assert(sizeof(Config::SharedStorage) <= 227 * 1024);

template <typename RowType>
using Context = dev::LowLatencyCombineContext<Config, RowType>;
template <typename RowType>
using ExpertKernel = dev::LowLatencyCombineKernel<dev::CombineExpertLayout<Context<RowType>>>;
template <typename RowType>
using RankKernel = dev::LowLatencyCombineKernel<dev::CombineRankLayout<Context<RowType>>>;

using Kernels = CompiledKernels<ExpertKernel, RankKernel, Config, CombineParams>;

}  // namespace

int32_t shared_bytes_of_low_latency_combine() { return sizeof(Config::SharedStorage); }

cudaError_t load_low_latency_combine() { return Kernels::load(); }

cudaError_t launch_low_latency_combine(const CombineParams& params,
                                       const LaunchShape& shape,
                                       cudaStream_t stream) {
  if (!fits_low_latency(params.view.layout, params.op)) return cudaErrorInvalidConfiguration;
  if (missing_ranks_of(params.op) != nullptr) {
    return launch_masking_combine(params, shape, stream);
  }
  return Kernels::launch(params.op.dtype, params, shape, stream);
}

}  // namespace jax_ep
