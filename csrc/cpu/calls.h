// SPDX-License-Identifier: Apache-2.0
// An operation on the CPU, from what each rank brings to it: its op, of any kind.
// All ranks of a group live in one address space, so an operation is a pure function of all
// ranks' calls, executed once every rank has arrived (see rendezvous.h).
#ifndef JAX_EP_CSRC_CPU_CALLS_H_
#define JAX_EP_CSRC_CPU_CALLS_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "csrc/core/ops.h"
#include "csrc/core/status.h"
#include "csrc/cpu/worker_pool.h"

namespace jax_ep {

using Call = std::variant<PlanOp, DispatchOp, CombineOp, PlanDispatchOp>;

// The op's name: "plan", "dispatch", "combine" or "plan_dispatch".
std::string_view op_name(const Call& call);

// What stands for the op of a rank that takes no part: it says so in the place of its number of
// ranks, and nothing else of it is read.
inline constexpr int32_t kAbsent = std::numeric_limits<int32_t>::min();
template <typename Op>
Op absent_op() {
  Op op;
  if constexpr (requires { op.dispatch; }) {
    op.plan.shape.num_ranks = op.dispatch.shape.num_ranks = kAbsent;
  } else {
    op.shape.num_ranks = kAbsent;
  }
  return op;
}
template <typename Op>
constexpr bool is_absent(const Op& op) {
  return shape_of(op).num_ranks == kAbsent;
}
bool is_absent(const Call& call);
// Of ops of which one is there.
template <typename Op>
const Op& first_present(std::span<const Op> ops) {
  return *std::find_if(ops.begin(), ops.end(), [](const Op& op) { return !is_absent(op); });
}

// One static parameter of a call, for comparing ranks and for messages.
struct Property {
  std::string_view name;
  std::string value;
};
std::vector<Property> properties(const Call& call);

// InvalidArgument: what is the same on all ranks is not. `text_of_rank` has its value on each; for
// example "ranks disagree: hidden is 512 on ranks 0,1,3 and 256 on rank 2". An empty one is of a
// rank that is not there.
Status disagreement(std::string_view name, std::span<const std::string> text_of_rank);

// OK if all ranks that are there brought the same op with the same properties; otherwise
// InvalidArgument that is the disagreement of the first difference.
Status check_agreement(std::span<const Call> calls);

// Runs the op for all ranks; `calls[r]` is rank r's and calls.size() == num_ranks. Selections of an
// absent rank's experts count as none, as if they were -1. Who is absent, and in the mask of those
// that are there, is missing.
// All outputs are written, or none is read by anybody: on an error every rank gets it.
Status execute(std::span<const Call> calls, WorkerPool& workers);

// Runs the op of a rank that takes no part, for its empty results.
Status execute_alone(int32_t rank, const Call& call, WorkerPool& workers);

// Runs the op of a rank that came when the others had gone on without it: it has what it brings
// itself, and misses all others.
Status execute_late(int32_t rank, const Call& call, WorkerPool& workers);

Status run_plan(std::span<const PlanOp> ops, WorkerPool& workers);
Status run_dispatch(std::span<const DispatchOp> ops, WorkerPool& workers);
Status run_combine(std::span<const CombineOp> ops, WorkerPool& workers);
// One after the other.
Status run_plan_dispatch(std::span<const PlanDispatchOp> ops, WorkerPool& workers);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_CALLS_H_
