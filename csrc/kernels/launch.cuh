// SPDX-License-Identifier: Apache-2.0
// How a kernel class becomes a __global__ function and is launched; for the .cu files here.
#ifndef JAX_EP_CSRC_KERNELS_LAUNCH_CUH_
#define JAX_EP_CSRC_KERNELS_LAUNCH_CUH_

#include <cuda_runtime.h>

#include "csrc/device/primitives.h"
#include "csrc/device/row_type_of.h"
#include "csrc/launch/launch.h"

namespace jax_ep {

// One block per SM: all main blocks run at once, which their waits for each other rely on.
//
// The blocks of a tail begin while the main ones still run, without what the start of a kernel is
// in a stream: what the SM has cached may be older than what the stream did before. And they must
// not be the stream's last ones while main blocks run: one of them stays for these.
template <typename Kernel, typename Config, typename Params>
__global__ void __launch_bounds__(Config::kWarps * 32, 1)
    run_kernel(const __grid_constant__ Params params) {
  const bool joins = Kernel::kHasTail && params.blocks.first > 0;
  if (joins) dev::fence_acq_rel<dev::Scope::kGpu>();
  Kernel(params).run();
  if (joins && dev::block_id() == 0) cudaGridDependencySynchronize();
}

template <typename Kernel, typename Config, typename Params>
[[nodiscard]] cudaError_t load_kernel() {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(&run_kernel<Kernel, Config, Params>),
                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(sizeof(typename Config::SharedStorage)));
}

// `load(std::type_identity<RowType>{})` for each row type, until one fails.
template <typename Load>
[[nodiscard]] cudaError_t load_row_types(const Load& load) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const cudaError_t error = with_row_type(dtype, cudaErrorInvalidValue, load);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Whether a block of a kernel between domains has all of its roles, and a warp that only receives:
// without one, ranks could wait for each other for ever.
template <typename Config>
constexpr bool takes_roles(OpKind op, const LaunchShape& shape) {
  constexpr int32_t kRelayAndCredits = 2;
  switch (op) {
    case OpKind::kPlan: return Config::kWarps >= 2;
    case OpKind::kDispatch:
      return shape.num_rail_senders > 0 &&
             shape.num_senders + shape.num_rail_senders + kRelayAndCredits < Config::kWarps;
    case OpKind::kCombine:
      return shape.num_rail_senders > 0 && shape.num_reducers > 0 &&
             shape.num_senders + shape.num_rail_senders + shape.num_reducers < Config::kWarps;
    case OpKind::kPlanDispatch: break;
  }
  return false;
}

// Whether a call can be made between its domains: all ranks take part, because a rank that does not
// would cut off its rail, and sums are those of the domains.
template <typename Params>
bool fits_domains(const Params& params) {
  const Topology& topology = params.network.topology;
  const NetworkLayout& layout = params.network.layout;
  // Low-latency kernels sum over any.
  if constexpr (requires { params.op.domain_size + params.num_rail_senders; }) {
    if (params.op.domain_size != topology.num_scaleup_ranks) return false;
  }
  return params.view.rank_mask == nullptr && topology.num_scaleout_ranks > 1 &&
         topology.num_ranks() == params.view.num_ranks &&
         topology.num_scaleup_ranks == params.view.num_neighbors &&
         topology.num_scaleup_ranks <= kMaxDomainRanks && layout.chunk_tokens >= 1 &&
         layout.chunk_tokens <= kMaxRailChunkTokens && layout.window >= 1 &&
         layout.gather_units >= 1 && layout.buffer_bytes < int64_t{1} << 32;
}

template <typename Kernel, typename Config, typename Params>
[[nodiscard]] cudaError_t launch_kernel(const Params& params,
                                        const LaunchShape& shape,
                                        cudaStream_t stream) {
  // A kernel with a pipeline moves rows: somebody has to send them.
  const bool sends = Config::kStages > 0;
  if (shape.num_warps != Config::kWarps || shape.num_stages != Config::kStages ||
      shape.num_tail_blocks < 0 || (shape.num_tail_blocks > 0 && !Kernel::kHasTail) ||
      shape.num_senders < (sends ? 1 : 0) || shape.num_senders > (sends ? Config::kWarps : 0)) {
    return cudaErrorInvalidConfiguration;
  }
  Params launched = params;
  launched.num_senders = shape.num_senders;
  if constexpr (requires { launched.num_rail_senders; }) {
    if (!takes_roles<Config>(Params::Op::kKind, shape)) return cudaErrorInvalidConfiguration;
    launched.num_rail_senders = shape.num_rail_senders;
    launched.num_reducers = shape.num_reducers;
  }
  if constexpr (requires { params.network; }) {
    if (!fits_domains(params)) return cudaErrorInvalidValue;
  }
  launched.blocks = {.first = 0, .num_main = shape.num_blocks, .num_tail = shape.num_tail_blocks};
  cudaLaunchAttribute joins{};
  joins.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  joins.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(shape.num_blocks);
  config.blockDim = Config::kWarps * 32;
  config.dynamicSmemBytes = sizeof(typename Config::SharedStorage);
  config.stream = stream;
  config.attrs = &joins;
  void* arguments[] = {&launched};
  const auto* const function = reinterpret_cast<const void*>(&run_kernel<Kernel, Config, Params>);
  // Not <<<>>> and cudaGetLastError, which would report what an earlier call of this thread left
  // behind, after this kernel has been launched.
  const cudaError_t error = cudaLaunchKernelExC(&config, function, arguments);
  if (error != cudaSuccess || shape.num_tail_blocks == 0) return error;
  launched.blocks.first = shape.num_blocks;
  config.gridDim = static_cast<unsigned>(shape.num_tail_blocks);
  config.numAttrs = 1;
  return cudaLaunchKernelExC(&config, function, arguments);
}

// A kernel that is compiled for each layout: both are loaded, and a call's layout chooses.
template <typename ExpertKernel, typename RankKernel, typename Config, typename Params>
[[nodiscard]] cudaError_t load_layouts() {
  const cudaError_t error = load_kernel<ExpertKernel, Config, Params>();
  return error != cudaSuccess ? error : load_kernel<RankKernel, Config, Params>();
}
template <typename ExpertKernel, typename RankKernel, typename Config, typename Params>
[[nodiscard]] cudaError_t launch_layout(const Params& params,
                                        const LaunchShape& shape,
                                        cudaStream_t stream) {
  switch (shape_of(params.op).layout) {
    case Layout::kExpert: return launch_kernel<ExpertKernel, Config>(params, shape, stream);
    case Layout::kRank: return launch_kernel<RankKernel, Config>(params, shape, stream);
  }
  return cudaErrorInvalidValue;
}

// The same of kernels that are compiled for each row type, too.
template <template <typename> typename ExpertKernel,
          template <typename> typename RankKernel,
          typename Config,
          typename Params>
struct CompiledKernels {
  [[nodiscard]] static cudaError_t load() {
    return load_row_types([](auto row) {
      using RowType = typename decltype(row)::type;
      return load_layouts<ExpertKernel<RowType>, RankKernel<RowType>, Config, Params>();
    });
  }
  [[nodiscard]] static cudaError_t launch(DType dtype,
                                          const Params& params,
                                          const LaunchShape& shape,
                                          cudaStream_t stream) {
    return with_row_type(dtype, cudaErrorInvalidValue, [&](auto row) {
      using RowType = typename decltype(row)::type;
      return launch_layout<ExpertKernel<RowType>, RankKernel<RowType>, Config>(
          params, shape, stream);
    });
  }
};

// What each kernel file loads.
[[nodiscard]] cudaError_t load_plan();
[[nodiscard]] cudaError_t load_dispatch();
[[nodiscard]] cudaError_t load_dispatch_products();
[[nodiscard]] cudaError_t load_combine();
[[nodiscard]] cudaError_t load_combine_domains();
[[nodiscard]] cudaError_t load_plan_dispatch();
[[nodiscard]] cudaError_t load_low_latency_dispatch();
[[nodiscard]] cudaError_t load_low_latency_combine();
[[nodiscard]] cudaError_t load_masking_dispatch();
[[nodiscard]] cudaError_t load_masking_combine();
[[nodiscard]] cudaError_t load_loopback_plan();
[[nodiscard]] cudaError_t load_loopback_dispatch();
[[nodiscard]] cudaError_t load_loopback_combine();
[[nodiscard]] cudaError_t load_loopback_low_latency_dispatch();
[[nodiscard]] cudaError_t load_loopback_low_latency_combine();

// What launch_dispatch launches where the op makes products.
[[nodiscard]] cudaError_t launch_dispatch_products(const DispatchParams& params,
                                                   const LaunchShape& shape,
                                                   cudaStream_t stream);
// What launch_combine launches where the op sums over domains.
[[nodiscard]] cudaError_t launch_combine_domains(const CombineParams& params,
                                                 const LaunchShape& shape,
                                                 cudaStream_t stream);
// What the launches of low-latency kernels launch where the op says which ranks were missing. Not
// in halves: cudaErrorInvalidConfiguration.
[[nodiscard]] cudaError_t launch_masking_dispatch(const PlanDispatchParams& params,
                                                  const LaunchShape& shape,
                                                  cudaStream_t stream);
[[nodiscard]] cudaError_t launch_masking_combine(const CombineParams& params,
                                                 const LaunchShape& shape,
                                                 cudaStream_t stream);

// Bytes of shared memory that a block of each takes; those of the four above take as much.
[[nodiscard]] int32_t shared_bytes_of_plan();
[[nodiscard]] int32_t shared_bytes_of_dispatch();
[[nodiscard]] int32_t shared_bytes_of_combine();
[[nodiscard]] int32_t shared_bytes_of_low_latency_dispatch();
[[nodiscard]] int32_t shared_bytes_of_low_latency_combine();

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_KERNELS_LAUNCH_CUH_
