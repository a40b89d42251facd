// SPDX-License-Identifier: Apache-2.0
// How large a launch is. Needs no GPU.
#ifndef JAX_EP_CSRC_TUNING_HEURISTICS_H_
#define JAX_EP_CSRC_TUNING_HEURISTICS_H_

#include <cstdint>

#include "csrc/core/dtype.h"
#include "csrc/core/ep_shape.h"
#include "csrc/core/error_record.h"
#include "csrc/tuning/launch_shape.h"
#include "csrc/tuning/tuned_launches.h"

namespace jax_ep {

// What a launch may use.
struct SmBudget {
  int32_t available;  // SMs of the device that this rank can have
  int32_t requested;  // EpConfig.max_num_sms; 0: the default of each operation
  int32_t tail = -1;  // EpConfig.tail_num_sms; -1: all that are available
};

// Blocks, warps and stages for an operation on rows of `row_bytes` bytes (0: none travel), which
// dispatch sends as `wire` says. As many blocks as the budget allows, fewer where there is little
// to do, at least 1. Dispatch gets a tail on idle SMs where much is left to expand when all has
// been sent. A choice counts as far as budget and work allow it. Depends on nothing else, so that
// every run does the same.
LaunchShape launch_shape(OpKind op,
                         const EpShape& shape,
                         int64_t row_bytes,
                         SmBudget budget,
                         Wire wire = Wire::kSame,
                         const LaunchChoice& choice = {});

// The same of a call that fits_low_latency (csrc/core/low_latency_fit.h): kPlanDispatch or
// kCombine. `spans_domains`: of the group, whose kernels have fewer warps then.
LaunchShape low_latency_launch_shape(OpKind op,
                                     const EpShape& shape,
                                     int64_t row_bytes,
                                     SmBudget budget,
                                     bool spans_domains,
                                     const LaunchChoice& choice = {});

// The same of a kernel between domains: kPlan, kDispatch or kCombine. A block has all roles.
// `plans_by_counts`: of the network heap, which has room for one kind of plan.
LaunchShape internode_launch_shape(
    OpKind op, const EpShape& shape, int64_t row_bytes, SmBudget budget, bool plans_by_counts);

// SMs that a high-throughput or a low-latency kernel takes at most where nobody asks for a number.
int32_t default_num_sms(bool low_latency);

// Whether a plan and its dispatch are launched as one kernel; else one after the other. A function
// of the shape alone, because all ranks must do the same.
bool plan_fits_in_dispatch(const EpShape& shape);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_TUNING_HEURISTICS_H_
