// SPDX-License-Identifier: Apache-2.0
// One rank's part of each operation: sizes, and pointers to the rank's own memory. The CPU runs an
// operation on the ops of all ranks of a group; a kernel is launched with the op of its rank.
//
// The letters of the shapes are those of csrc/core/ep_shape.h. What an op can do without is null.
#ifndef JAX_EP_CSRC_CORE_OPS_H_
#define JAX_EP_CSRC_CORE_OPS_H_

#include <cstdint>
#include <string_view>

#include "csrc/core/dtype.h"
#include "csrc/core/ep_shape.h"
#include "csrc/core/protocol.h"

namespace jax_ep {

// Routing -> row of every selection at its destination, and the counts.
struct PlanOp {
  static constexpr OpKind kKind = OpKind::kPlan;

  EpShape shape;
  // [T, K] in: global expert, -1 = no selection. What is not in [-1, E) is an error on the CPU, and
  // counts as -1 on GPUs.
  const int32_t* topk_idx = nullptr;
  // [R] in, bytes of 0 or 1: the ranks that take part, null: all. The same on all that do.
  const uint8_t* rank_mask = nullptr;
  int32_t* slot = nullptr;          // [T, K] out: row at the destination rank, -1 = none or dropped
  int32_t* row_source = nullptr;    // [C] out: source rank * T + source token, -1 = no token
  int32_t* row_topk_idx = nullptr;  // [C, K] out, kRank only: local expert or -1
  // [R * T, J] out, GPUs only: rows that this rank holds of each token of each rank, ascending,
  // then -1; J = max_rows_per_token.
  int32_t* source_slot = nullptr;
  int32_t* group_sizes = nullptr;        // [num_row_groups] out: rows, alignment padding included
  int32_t* tokens_per_expert = nullptr;  // [L] out: selections asked for, before any drop
  int32_t* num_dropped = nullptr;        // [] out: rows of this rank past the capacity
};

// How rows look outside the kernels: in `dtype`, or quantized with their scales.
enum class RowFormat : int32_t {
  kDType = 0,
  kFloat8E4M3 = 1,  // float8_e4m3fn [.., H] and float32 scales [.., ceil(H / kScaleBlock)]
};

constexpr std::string_view name(RowFormat format) {
  return format == RowFormat::kDType ? "dtype" : "float8_e4m3fn";
}

// Rows and scalars travel from their tokens to their slots. As the backward of a weighted combine a
// dispatch also makes the products: where a row arrives, it is multiplied by the row's weight, and
// its dot product with the same row of `y` is taken, before it is multiplied.
struct DispatchOp {
  static constexpr OpKind kKind = OpKind::kDispatch;

  EpShape shape;
  int64_t hidden = 0;       // H, elements; 0: no rows travel
  int32_t num_scalars = 0;  // K: one float32 per selection travels too; 0: none does
  DType dtype = DType::kFloat32;
  Wire wire = Wire::kSame;
  RowFormat x_format = RowFormat::kDType;     // kFloat8E4M3: on the FP8 wire only
  RowFormat rows_format = RowFormat::kDType;  // likewise
  bool zero_fill = true;            // rows that hold no token become zeros, else are left alone
  bool weighted = false;            // rows are multiplied by row_weights; Wire::kSame only
  bool with_dots = false;           // row_dots are taken; Wire::kSame only
  const void* x = nullptr;          // [T, H] in
  const float* x_scales = nullptr;  // [T, ceil(H / 128)] in, x_format kFloat8E4M3 only
  const float* token_scalars = nullptr;  // [T, num_scalars] in
  const float* row_weights = nullptr;    // [C] in if weighted
  const void* y = nullptr;               // [C, H] in if with_dots
  const int32_t* topk_idx = nullptr;     // [T, K] in, as given to the plan
  const int32_t* slot = nullptr;         // [T, K] in, from the plan
  const int32_t* row_source = nullptr;   // [C] in, from the plan
  const int32_t* source_slot = nullptr;  // [R * T, J] in, from the plan; GPUs only
  const uint8_t* rank_mask = nullptr;    // as of a plan
  void* rows = nullptr;                  // [C, H] out
  float* rows_scales = nullptr;          // [C, ceil(H / 128)] out, rows_format kFloat8E4M3 only
  float* row_scalars = nullptr;  // [C] (kExpert) or [C, K] (kRank) out if num_scalars > 0; zeros
                                 // where there is no selection
  float* row_dots = nullptr;     // [C] out if with_dots; zeros where there is no token
  // [R] out, bytes of 0 or 1; only of a dispatch that makes its plan too. 1: this rank did not get
  // all of that rank's data in this exchange, and all other results are as if that rank's
  // selections, and those of its experts, had been -1. 0 of this rank itself, and of ranks that
  // rank_mask leaves out. Null: a rank that does not come is an error. On GPUs a rank may go
  // missing when all of its routing has come: then that counts, and its rows hold no token.
  uint8_t* missing_ranks = nullptr;
};

// How a dot product is summed, in float32. Of each block of elements, element i goes to sum
// i % kDotSums, in ascending order, by fused multiply-adds that begin with 0; then neighboring sums
// are added, 0 and 1, 2 and 3, ..., until one is left. The blocks' sums are added in ascending
// order, to 0. So a warp has eight sums in each lane for a block, and one between blocks.
inline constexpr int64_t kDotSums = 256;
inline constexpr int64_t kDotBlock = 1024;

// Rows travel back and are summed; row scalars travel back to their selections.
struct CombineOp {
  static constexpr OpKind kKind = OpKind::kCombine;

  EpShape shape;
  int64_t hidden = 0;  // H; 0: no rows travel
  bool weighted = false;
  int32_t num_scalars = 0;  // K: row_scalars travel back; 0: they don't
  // D, a divisor of R: the sum over each D consecutive ranks is rounded before it is added to those
  // of the others. 0 is R; with R and with 1 there is one level of sums, and the same bits.
  int32_t domain_size = 0;
  DType dtype = DType::kFloat32;
  const void* y = nullptr;                // [C, H] in
  const float* weights = nullptr;         // [C] (kExpert) or [C, K] (kRank) in if weighted
  const float* row_scalars = nullptr;     // like weights, in if num_scalars > 0
  const int32_t* topk_idx = nullptr;      // [T, K] in
  const int32_t* slot = nullptr;          // [T, K] in
  const int32_t* row_topk_idx = nullptr;  // [C, K] in, GPUs only, if kRank and weighted
  const int32_t* source_slot = nullptr;   // [R * T, J] in, GPUs only
  const uint8_t* rank_mask = nullptr;     // as of a plan
  void* out = nullptr;                    // [T, H] out
  float* token_scalars = nullptr;         // [T, K] out if num_scalars > 0; 0 where slot < 0
  // As of a dispatch: where it is 1, the sums have nothing of that rank's rows.
  uint8_t* missing_ranks = nullptr;
};

constexpr bool sums_over_domains(const CombineOp& op) {
  return op.domain_size > 1 && op.domain_size < op.shape.num_ranks;
}

// A plan and the dispatch that it is for, as one operation. What the dispatch reads of a plan is
// what this one writes.
struct PlanDispatchOp {
  static constexpr OpKind kKind = OpKind::kPlanDispatch;

  PlanOp plan;
  DispatchOp dispatch;
};
// `dispatch` as far as it has nothing of a plan.
constexpr PlanDispatchOp plan_dispatch_op(const PlanOp& plan, DispatchOp dispatch) {
  dispatch.shape = plan.shape;
  dispatch.topk_idx = plan.topk_idx;
  dispatch.slot = plan.slot;
  dispatch.row_source = plan.row_source;
  dispatch.source_slot = plan.source_slot;
  dispatch.rank_mask = plan.rank_mask;
  return {plan, dispatch};
}

// What the first half of an exchange gives, uint32[2]: by it the second half finds its flight.
inline constexpr int64_t kTicketWords = 2;

constexpr const EpShape& shape_of(const PlanOp& op) { return op.shape; }
constexpr const EpShape& shape_of(const DispatchOp& op) { return op.shape; }
constexpr const EpShape& shape_of(const CombineOp& op) { return op.shape; }
constexpr const EpShape& shape_of(const PlanDispatchOp& op) { return op.dispatch.shape; }

constexpr const uint8_t* rank_mask_of(const PlanOp& op) { return op.rank_mask; }
constexpr const uint8_t* rank_mask_of(const DispatchOp& op) { return op.rank_mask; }
constexpr const uint8_t* rank_mask_of(const CombineOp& op) { return op.rank_mask; }
constexpr const uint8_t* rank_mask_of(const PlanDispatchOp& op) { return op.plan.rank_mask; }

// Where an operation says who was missing; null: it is an error if somebody is.
constexpr uint8_t* missing_ranks_of(const PlanOp& /*op*/) { return nullptr; }
constexpr uint8_t* missing_ranks_of(const DispatchOp& op) { return op.missing_ranks; }
constexpr uint8_t* missing_ranks_of(const CombineOp& op) { return op.missing_ranks; }
constexpr uint8_t* missing_ranks_of(const PlanDispatchOp& op) { return op.dispatch.missing_ranks; }

// How the rows of an operation travel.
constexpr Wire wire_of(const PlanOp& /*op*/) { return Wire::kSame; }
constexpr Wire wire_of(const DispatchOp& op) { return op.wire; }
constexpr Wire wire_of(const CombineOp& /*op*/) { return Wire::kSame; }
constexpr Wire wire_of(const PlanDispatchOp& op) { return op.dispatch.wire; }

// Which products a dispatch makes, as bits.
constexpr uint32_t products_of(const DispatchOp& op) {
  return static_cast<uint32_t>(op.weighted) | static_cast<uint32_t>(op.with_dots) << 1;
}

// The tag of an op's call (see csrc/core/protocol.h, which says what `call_site` is).
constexpr uint32_t call_tag_of(const PlanOp& op, uint32_t call_site) {
  return call_tag(op.shape, 0, DType::kFloat32, Wire::kSame, 0, 0, call_site);
}
constexpr uint32_t call_tag_of(const DispatchOp& op, uint32_t call_site) {
  return call_tag(
      op.shape, op.hidden, op.dtype, op.wire, op.num_scalars, products_of(op), call_site);
}
constexpr uint32_t call_tag_of(const CombineOp& op, uint32_t call_site) {
  return call_tag(
      op.shape, op.hidden, op.dtype, Wire::kSame, op.num_scalars, op.weighted, call_site);
}
constexpr uint32_t call_tag_of(const PlanDispatchOp& op, uint32_t call_site) {
  return call_tag_of(op.dispatch, call_site);
}

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_OPS_H_
