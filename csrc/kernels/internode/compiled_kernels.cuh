// SPDX-License-Identifier: Apache-2.0
// The kernels between domains as they are compiled for a transport; for the .cu files here. All is
// public: what nvcc makes of a kernel names the types of its template.
#ifndef JAX_EP_CSRC_KERNELS_INTERNODE_COMPILED_KERNELS_CUH_
#define JAX_EP_CSRC_KERNELS_INTERNODE_COMPILED_KERNELS_CUH_

#include "csrc/core/low_latency_fit.h"
#include "csrc/kernels/internode/combine_kernel.h"
#include "csrc/kernels/internode/counts_plan_kernel.h"
#include "csrc/kernels/internode/dispatch_kernel.h"
#include "csrc/kernels/internode/plan_kernel.h"
#include "csrc/kernels/launch.cuh"
#include "csrc/kernels/low_latency/combine_kernel.h"
#include "csrc/kernels/low_latency/dispatch_kernel.h"
#include "csrc/tuning/warps_and_stages.h"

namespace jax_ep {

template <typename Transport>
struct CompiledInternodePlan {
  using Params = InternodeParams<PlanOp, Transport>;
  // With the tables of many experts: a group of several domains has many.
  using Config = dev::PlanConfig<kCompiledPlans[1].num_warps, kCompiledPlans[1].max_bins>;
  using ExpertKernel = dev::InternodePlanKernel<dev::PlanExpertLayout<Config>, Transport>;
  using RankKernel = dev::InternodePlanKernel<dev::PlanRankLayout<Config>, Transport>;
  using CountsConfig = dev::PlanConfig<kCompiledCountsPlan.num_warps, kCompiledCountsPlan.max_bins>;
  using CountsExpertKernel = dev::CountsPlanKernel<dev::PlanExpertLayout<CountsConfig>, Transport>;
  using CountsRankKernel = dev::CountsPlanKernel<dev::PlanRankLayout<CountsConfig>, Transport>;

  [[nodiscard]] static cudaError_t load() {
    const cudaError_t error = load_layouts<ExpertKernel, RankKernel, Config, Params>();
    if (error != cudaSuccess) return error;
    return load_layouts<CountsExpertKernel, CountsRankKernel, CountsConfig, Params>();
  }
  // The network heap has room for the one or the other.
  [[nodiscard]] static cudaError_t launch(const Params& params,
                                          const LaunchShape& shape,
                                          cudaStream_t stream) {
    if (plans_by_counts(params.network.layout)) {
      return launch_layout<CountsExpertKernel, CountsRankKernel, CountsConfig>(
          params, shape, stream);
    }
    return launch_layout<ExpertKernel, RankKernel, Config>(params, shape, stream);
  }
};

template <typename Transport>
struct CompiledInternodeDispatch {
  using Params = InternodeParams<DispatchOp, Transport>;

  [[nodiscard]] static cudaError_t load() {
    const cudaError_t error = Compiled<false>::Kernels::load();
    return error != cudaSuccess ? error : Compiled<true>::Kernels::load();
  }
  [[nodiscard]] static cudaError_t launch(const Params& params,
                                          const LaunchShape& shape,
                                          cudaStream_t stream) {
    return products_of(params.op) != 0
               ? Compiled<true>::Kernels::launch(params.op.dtype, params, shape, stream)
               : Compiled<false>::Kernels::launch(params.op.dtype, params, shape, stream);
  }

  template <bool kMakesProducts>
  struct Compiled {
    using Config = dev::DispatchConfig<kCompiledInternodeDispatch.num_warps,
                                       kCompiledInternodeDispatch.num_stages,
                                       kDispatchSegmentBytes,
                                       kMakesProducts>;
    template <typename RowType>
    using ExpertKernel =
        dev::InternodeDispatchKernel<dev::DispatchExpertLayout<Config, RowType>, Transport>;
    template <typename RowType>
    using RankKernel =
        dev::InternodeDispatchKernel<dev::DispatchRankLayout<Config, RowType>, Transport>;
    using Kernels = CompiledKernels<ExpertKernel, RankKernel, Config, Params>;
  };
};

template <typename Transport>
struct CompiledInternodeCombine {
  using Params = InternodeParams<CombineOp, Transport>;

  [[nodiscard]] static cudaError_t load() { return Kernels::load(); }
  [[nodiscard]] static cudaError_t launch(const Params& params,
                                          const LaunchShape& shape,
                                          cudaStream_t stream) {
    return Kernels::launch(params.op.dtype, params, shape, stream);
  }

  using Config = dev::CombineConfig<kCompiledInternodeCombine.num_warps,
                                    kCompiledInternodeCombine.num_stages,
                                    kCombineSegmentBytes,
                                    /*kSumsOverDomains=*/true>;
  template <typename RowType>
  using Context = dev::CombineContext<Config, RowType>;
  template <typename RowType>
  using ExpertKernel =
      dev::InternodeCombineKernel<dev::CombineExpertLayout<Context<RowType>>, Transport>;
  template <typename RowType>
  using RankKernel =
      dev::InternodeCombineKernel<dev::CombineRankLayout<Context<RowType>>, Transport>;
  using Kernels = CompiledKernels<ExpertKernel, RankKernel, Config, Params>;
};

// The low-latency ones, as csrc/kernels/low_latency has them for one domain, but for their warps.
template <typename Transport>
struct CompiledLowLatencyDispatch {
  using Params = InternodeLowLatencyParams<PlanDispatchOp, Transport>;

  [[nodiscard]] static cudaError_t load() { return Kernels::load(); }
  [[nodiscard]] static cudaError_t launch(const Params& params,
                                          const LaunchShape& shape,
                                          cudaStream_t stream) {
    if (!fits_low_latency(params.view.layout, params.op)) return cudaErrorInvalidConfiguration;
    return Kernels::launch(params.op.dispatch.dtype, params, shape, stream);
  }

  using Config = dev::LowLatencyDispatchConfig<kCompiledFarLowLatencyDispatch.num_warps>;
  static_assert(Config::kStages == kCompiledFarLowLatencyDispatch.num_stages);
  using Far = dev::FarRanks<Transport>;
  template <typename RowType>
  using ExpertKernel = dev::LowLatencyDispatchKernel<RowType, dev::PlanExpertLayout<Config>, Far>;
  template <typename RowType>
  using RankKernel = dev::LowLatencyDispatchKernel<RowType, dev::PlanRankLayout<Config>, Far>;
  using Kernels = CompiledKernels<ExpertKernel, RankKernel, Config, Params>;
};

template <typename Transport>
struct CompiledLowLatencyCombine {
  using Params = InternodeLowLatencyParams<CombineOp, Transport>;

  [[nodiscard]] static cudaError_t load() { return Kernels::load(); }
  [[nodiscard]] static cudaError_t launch(const Params& params,
                                          const LaunchShape& shape,
                                          cudaStream_t stream) {
    if (!fits_low_latency(params.view.layout, params.op, /*spans_domains=*/true)) {
      return cudaErrorInvalidConfiguration;
    }
    return Kernels::launch(params.op.dtype, params, shape, stream);
  }

  using Config = dev::LowLatencyCombineConfig<kCompiledFarLowLatencyCombine.num_warps>;
  static_assert(Config::kStages == kCompiledFarLowLatencyCombine.num_stages);
  using Far = dev::FarRanks<Transport>;
  template <typename RowType>
  using Context = dev::LowLatencyCombineContext<Config, RowType>;
  template <typename RowType>
  using ExpertKernel =
      dev::LowLatencyCombineKernel<dev::CombineExpertLayout<Context<RowType>>, Far>;
  template <typename RowType>
  using RankKernel = dev::LowLatencyCombineKernel<dev::CombineRankLayout<Context<RowType>>, Far>;
  using Kernels = CompiledKernels<ExpertKernel, RankKernel, Config, Params>;
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_KERNELS_INTERNODE_COMPILED_KERNELS_CUH_
