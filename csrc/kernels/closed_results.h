// SPDX-License-Identifier: Apache-2.0
// What kernels of a closed group leave as results: no row, no selection, and NaN; and those of a
// rank that takes no part: no row, no selection, and zeros. All threads of the main blocks.
#ifndef JAX_EP_CSRC_KERNELS_CLOSED_RESULTS_H_
#define JAX_EP_CSRC_KERNELS_CLOSED_RESULTS_H_

#include "csrc/core/ops.h"
#include "csrc/core/work_partition.h"
#include "csrc/device/exchange.h"

namespace jax_ep::dev {

// What comes after must not lead anywhere.
JAX_EP_DEVICE void poison_plan(const Exchange& exchange, const PlanOp& op) {
  const EpShape& shape = op.shape;
  const i64 max_rows = max_rows_per_token(shape.layout, shape.num_topk, shape.num_local_experts());
  exchange.poison(op.slot, shape.num_tokens * shape.num_topk);
  exchange.poison(op.row_source, shape.recv_capacity);
  if (shape.layout == Layout::kRank) {
    exchange.poison(op.row_topk_idx, shape.recv_capacity * shape.num_topk);
  }
  exchange.poison(op.source_slot, shape.num_ranks * shape.num_tokens * max_rows);
  exchange.fill(Ptr<i32>{op.group_sizes}, shape.num_row_groups(), 0);
  exchange.fill(Ptr<i32>{op.tokens_per_expert}, shape.num_local_experts(), 0);
  exchange.fill(Ptr<i32>{op.num_dropped}, 1, 0);
}

// A plan of nothing holds just that.
JAX_EP_DEVICE void leave_empty_plan(const Exchange& exchange, const PlanOp& op) {
  poison_plan(exchange, op);
}

// All words of results become this: zeros, or ones, which are NaN.
inline constexpr u32 kZeroWord = 0;
inline constexpr u32 kNanWord = ~0U;

// Rows of so many bytes, which are aligned as they are long.
template <typename Element>
JAX_EP_DEVICE void set_bytes(
    const Exchange& exchange, void* rows, i64 num_rows, i64 row_bytes, u32 word) {
  if (row_bytes % 16 == 0) {
    exchange.fill(Ptr<Vec16>{static_cast<Vec16*>(rows)},
                  num_rows * row_bytes / 16,
                  Vec16{{word, word, word, word}});
  } else {
    exchange.fill(Ptr<Element>{static_cast<Element*>(rows)},
                  num_rows * row_bytes / static_cast<i64>(sizeof(Element)),
                  static_cast<Element>(word));
  }
}
JAX_EP_DEVICE void set_floats(const Exchange& exchange, float* values, i64 count, u32 word) {
  exchange.fill(Ptr<u32>{reinterpret_cast<u32*>(values)}, count, word);
}

// What a dispatch writes besides its rows, and if `with_rows`, these.
template <typename RowType>
JAX_EP_DEVICE void set_rows(const Exchange& exchange,
                            const DispatchOp& op,
                            bool with_rows,
                            u32 word) {
  const i64 capacity = op.shape.recv_capacity;
  if (with_rows && op.rows_format == RowFormat::kFloat8E4M3) {
    set_bytes<u8>(exchange, op.rows, capacity, op.hidden, word);
    set_floats(exchange, op.rows_scales, capacity * ceil_div(op.hidden, kScaleBlock), word);
  } else if (with_rows) {
    using Element = typename RowType::Element;
    const i64 row_bytes = op.hidden * static_cast<i64>(sizeof(Element));
    set_bytes<Element>(exchange, op.rows, capacity, row_bytes, word);
  }
  if (op.num_scalars > 0) {
    set_floats(exchange, op.row_scalars, capacity * op.shape.scalars_per_row(), word);
  }
  if (op.with_dots) set_floats(exchange, op.row_dots, capacity, word);
}
template <typename RowType>
JAX_EP_DEVICE void leave_empty_rows(const Exchange& exchange, const DispatchOp& op) {
  set_rows<RowType>(exchange, op, op.zero_fill, kZeroWord);
}
template <typename RowType>
JAX_EP_DEVICE void poison_rows(const Exchange& exchange, const DispatchOp& op) {
  set_rows<RowType>(exchange, op, true, kNanWord);
}

// Nobody has sent anything.
JAX_EP_DEVICE void poison_missing_ranks(const Exchange& exchange, u8* missing_ranks) {
  exchange.fill(Ptr<u8>{missing_ranks}, exchange.view().num_ranks, u8{1});
}

// What a combine writes.
template <typename RowType>
JAX_EP_DEVICE void set_sums(const Exchange& exchange, const CombineOp& op, u32 word) {
  using Element = typename RowType::Element;
  const i64 row_bytes = op.hidden * static_cast<i64>(sizeof(Element));
  set_bytes<Element>(exchange, op.out, op.shape.num_tokens, row_bytes, word);
  if (op.num_scalars == 0) return;
  set_floats(exchange, op.token_scalars, op.shape.num_tokens * op.shape.num_topk, word);
}
template <typename RowType>
JAX_EP_DEVICE void leave_empty_sums(const Exchange& exchange, const CombineOp& op) {
  set_sums<RowType>(exchange, op, kZeroWord);
}
template <typename RowType>
JAX_EP_DEVICE void poison_sums(const Exchange& exchange, const CombineOp& op) {
  set_sums<RowType>(exchange, op, kNanWord);
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_CLOSED_RESULTS_H_
