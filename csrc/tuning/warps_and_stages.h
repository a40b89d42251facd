// SPDX-License-Identifier: Apache-2.0
// The blocks that the kernels are compiled for, by their warps and stages. The kernels' .cu files
// instantiate each of these, and heuristics.h chooses from them: no other launch exists.
#ifndef JAX_EP_CSRC_TUNING_WARPS_AND_STAGES_H_
#define JAX_EP_CSRC_TUNING_WARPS_AND_STAGES_H_

#include <cstdint>

#include "csrc/core/limits.h"

namespace jax_ep {

struct CompiledPlan {
  int32_t num_warps;
  int32_t max_bins;  // its tables have room for so many
};
// In the order of preference: of the first, more warps fit beside the tables.
inline constexpr CompiledPlan kCompiledPlans[] = {
    {.num_warps = 16, .max_bins = 1088},
    {.num_warps = 12, .max_bins = kMaxExperts + kMaxRanks},
};

// Of a plan by counts: fewer, because it needs more registers than a quarter of an SM has for three
// warps.
inline constexpr CompiledPlan kCompiledCountsPlan{.num_warps = 8,
                                                  .max_bins = kMaxExperts + kMaxRanks};

struct CompiledTransfer {
  int32_t num_warps;
  int32_t num_stages;  // of each warp's pipeline through shared memory
};
inline constexpr CompiledTransfer kCompiledDispatch{.num_warps = 14, .num_stages = 4};
// A plan that is made in a dispatch's blocks: its tables have room for so many bins.
inline constexpr int32_t kMaxPlanDispatchBins = 2048;
inline constexpr CompiledTransfer kCompiledCombine{.num_warps = 16, .num_stages = 4};
// Between domains: fewer warps, because a kernel with all roles needs more registers, of which each
// quarter of an SM has enough for three such warps, or two.
inline constexpr CompiledTransfer kCompiledInternodeDispatch{.num_warps = 12, .num_stages = 4};
inline constexpr CompiledTransfer kCompiledInternodeCombine{.num_warps = 8, .num_stages = 4};
inline constexpr CompiledTransfer kCompiledLowLatencyDispatch{.num_warps = 16, .num_stages = 2};
inline constexpr CompiledTransfer kCompiledLowLatencyCombine{.num_warps = 16, .num_stages = 1};
// The same between domains, where they need more registers.
inline constexpr CompiledTransfer kCompiledFarLowLatencyDispatch{.num_warps = 12, .num_stages = 2};
inline constexpr CompiledTransfer kCompiledFarLowLatencyCombine{.num_warps = 8, .num_stages = 1};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_TUNING_WARPS_AND_STAGES_H_
