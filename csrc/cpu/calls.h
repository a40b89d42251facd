// SPDX-License-Identifier: Apache-2.0
// What one rank brings to an EP operation on the CPU: static parameters and its own buffers.
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

#include "csrc/core/dtype.h"
#include "csrc/core/ep_shape.h"
#include "csrc/core/status.h"
#include "csrc/cpu/worker_pool.h"

namespace jax_ep {

// Routing -> row of every selection at its destination, and the counts.
struct PlanCall {
  EpShape shape;
  const int32_t* topk_idx = nullptr;  // [T, K] in: global expert, -1 = no selection
  int32_t* slot = nullptr;          // [T, K] out: row at the destination rank, -1 = none or dropped
  int32_t* row_source = nullptr;    // [C] out: source rank * T + source token, -1 = no token
  int32_t* row_topk_idx = nullptr;  // [C, K] out, kRank only (else unused): local expert or -1
  int32_t* group_sizes = nullptr;   // [num_row_groups] out: rows, alignment padding included
  int32_t* tokens_per_expert = nullptr;  // [L] out: selections asked for, before any drop
  int32_t* num_dropped = nullptr;        // [] out: rows of this rank past the capacity
};

// Rows and scalars travel from their tokens to their slots.
struct DispatchCall {
  EpShape shape;
  int64_t hidden = 0;   // H, elements; 0: no rows travel
  int32_t scalars = 0;  // K: one float32 per selection travels too; 0: none does
  DType dtype = DType::kFloat32;
  Wire wire = Wire::kSame;
  bool zero_fill = true;    // rows that hold no token become zeros, else are left alone
  const void* x = nullptr;  // [T, H] in
  const float* token_scalars = nullptr;  // [T, scalars] in
  const int32_t* topk_idx = nullptr;     // [T, K] in, as given to the plan
  const int32_t* slot = nullptr;         // [T, K] in, from the plan
  const int32_t* row_source = nullptr;   // [C] in, from the plan
  void* rows = nullptr;                  // [C, H] out
  float* row_scalars = nullptr;  // [C] (kExpert) or [C, K] (kRank) out if scalars > 0; zeros
                                 // where there is no selection
};

// Rows travel back and are summed; row scalars travel back to their selections.
struct CombineCall {
  EpShape shape;
  int64_t hidden = 0;  // H; 0: no rows travel
  bool weighted = false;
  int32_t scalars = 0;  // K: row_scalars travel back; 0: they don't
  DType dtype = DType::kFloat32;
  const void* y = nullptr;             // [C, H] in
  const float* weights = nullptr;      // [C] (kExpert) or [C, K] (kRank) in if weighted
  const float* row_scalars = nullptr;  // like weights, in if scalars > 0
  const int32_t* topk_idx = nullptr;   // [T, K] in
  const int32_t* slot = nullptr;       // [T, K] in
  void* out = nullptr;                 // [T, H] out
  float* token_scalars = nullptr;      // [T, K] out if scalars > 0; 0 where slot < 0
};

using Call = std::variant<PlanCall, DispatchCall, CombineCall>;

// The op's name: "plan", "dispatch" or "combine".
std::string_view op_name(const Call& call);

// One static parameter of a call, for comparing ranks and for messages.
struct Property {
  std::string_view name;
  std::string value;
};
std::vector<Property> properties(const Call& call);

// OK if all ranks brought the same op with the same properties; otherwise InvalidArgument that
// names the ranks and the first difference, for example
// "ranks disagree: hidden is 512 on ranks 0,1,3 and 256 on rank 2".
Status check_agreement(std::span<const Call> by_rank);

// Runs the op for all ranks; `by_rank[r]` is rank r's call and by_rank.size() == num_ranks.
// All outputs are written, or none is read by anybody: on an error every rank gets it.
Status execute(std::span<const Call> by_rank, WorkerPool& workers);

Status run_plan(std::span<const PlanCall> by_rank, WorkerPool& workers);
Status run_dispatch(std::span<const DispatchCall> by_rank, WorkerPool& workers);
Status run_combine(std::span<const CombineCall> by_rank, WorkerPool& workers);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_CALLS_H_
