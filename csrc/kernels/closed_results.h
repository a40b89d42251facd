// SPDX-License-Identifier: Apache-2.0
// What kernels of a closed group leave as results: no row, no selection, and NaN. All threads.
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

template <typename RowType>
JAX_EP_DEVICE void poison_rows(const Exchange& exchange, const DispatchOp& op) {
  const i64 capacity = op.shape.recv_capacity;
  if (op.rows_format == RowFormat::kFloat8E4M3) {
    exchange.poison(static_cast<u8*>(op.rows), capacity * op.hidden);
    exchange.poison(reinterpret_cast<u32*>(op.rows_scales),
                    capacity * ceil_div(op.hidden, kScaleBlock));
  } else {
    exchange.poison(static_cast<typename RowType::Element*>(op.rows), capacity * op.hidden);
  }
  if (op.num_scalars > 0) {
    exchange.poison(reinterpret_cast<u32*>(op.row_scalars), capacity * op.shape.scalars_per_row());
  }
  if (op.with_dots) exchange.poison(reinterpret_cast<u32*>(op.row_dots), capacity);
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_CLOSED_RESULTS_H_
