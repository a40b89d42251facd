// SPDX-License-Identifier: Apache-2.0
// The combine whose sums are rounded domain by domain, as a kernel of its own: it has two sums in
// its registers, and the other one's are short. The sums are made in csrc/device/piece_sum.h.
#include "csrc/kernels/high_throughput/combine_kernel.h"
#include "csrc/kernels/launch.cuh"
#include "csrc/tuning/warps_and_stages.h"

namespace jax_ep {
namespace {

using Config = dev::CombineConfig<kCompiledCombine.num_warps,
                                  kCompiledCombine.num_stages,
                                  kCombineSegmentBytes,
                                  /*kSumsOverDomains=*/true>;

template <typename RowType>
using ExpertKernel =
    dev::CombineKernel<dev::CombineExpertLayout<dev::CombineContext<Config, RowType>>>;
template <typename RowType>
using RankKernel = dev::CombineKernel<dev::CombineRankLayout<dev::CombineContext<Config, RowType>>>;

using Kernels = CompiledKernels<ExpertKernel, RankKernel, Config, CombineParams>;

}  // namespace

cudaError_t load_combine_domains() { return Kernels::load(); }

cudaError_t launch_combine_domains(const CombineParams& params,
                                   const LaunchShape& shape,
                                   cudaStream_t stream) {
  return Kernels::launch(params.op.dtype, params, shape, stream);
}

}  // namespace jax_ep
