// SPDX-License-Identifier: Apache-2.0
// An operation on the CPU, from what each rank brings to it: its op, of any kind.
// All ranks of a group live in one address space, so an operation is a pure function of all
// ranks' calls, executed once every rank has arrived (see rendezvous.h).
#ifndef JAX_EP_CSRC_CPU_CALLS_H_
#define JAX_EP_CSRC_CPU_CALLS_H_

#include <cstdint>
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

// One static parameter of a call, for comparing ranks and for messages.
struct Property {
  std::string_view name;
  std::string value;
};
std::vector<Property> properties(const Call& call);

// InvalidArgument: what is the same on all ranks is not. `text_of_rank` has its value on each; for
// example "ranks disagree: hidden is 512 on ranks 0,1,3 and 256 on rank 2".
Status disagreement(std::string_view name, std::span<const std::string> text_of_rank);

// OK if all ranks brought the same op with the same properties; otherwise InvalidArgument that
// is the disagreement of the first difference.
Status check_agreement(std::span<const Call> calls);

// Runs the op for all ranks; `calls[r]` is rank r's and calls.size() == num_ranks.
// All outputs are written, or none is read by anybody: on an error every rank gets it.
Status execute(std::span<const Call> calls, WorkerPool& workers);

Status run_plan(std::span<const PlanOp> ops, WorkerPool& workers);
Status run_dispatch(std::span<const DispatchOp> ops, WorkerPool& workers);
Status run_combine(std::span<const CombineOp> ops, WorkerPool& workers);
// One after the other.
Status run_plan_dispatch(std::span<const PlanDispatchOp> ops, WorkerPool& workers);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_CALLS_H_
