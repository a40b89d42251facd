// SPDX-License-Identifier: Apache-2.0
// Which calls the low-latency kernels serve. A function of the group and of what all ranks must
// agree on in a call, because all must do the same.
#ifndef JAX_EP_CSRC_CORE_LOW_LATENCY_FIT_H_
#define JAX_EP_CSRC_CORE_LOW_LATENCY_FIT_H_

#include "csrc/core/heap_layout.h"
#include "csrc/core/ops.h"

namespace jax_ep {

constexpr bool fits_low_latency(const HeapLayout& heap, const EpShape& shape) {
  const int64_t selections = shape.num_ranks * shape.num_tokens * shape.num_topk;
  return heap.low_latency_tokens > 0 && shape.num_tokens <= heap.low_latency_tokens &&
         selections <= kMaxLowLatencySelections &&
         num_bins(shape.layout, shape.num_experts, shape.num_ranks) <= kMaxLowLatencyBins;
}

constexpr int64_t element_bytes(DType dtype, RowFormat format) {
  return format == RowFormat::kDType ? size_bytes(dtype) : 1;
}

// Rows that are no multiple of 16 bytes, wherever they lie, are left to the other kernels, as are
// the products and the scalars of gradients, and within one domain sums over several.
constexpr bool fits_low_latency(const HeapLayout& heap,
                                const PlanDispatchOp& op,
                                bool /*spans_domains*/ = false) {
  const DispatchOp& rows = op.dispatch;
  const int64_t on_wire = rows.wire == Wire::kSame ? size_bytes(rows.dtype) : 1;
  return fits_low_latency(heap, rows.shape) && rows.hidden > 0 && !rows.weighted &&
         !rows.with_dots && rows.hidden * on_wire % 16 == 0 &&
         rows.hidden * element_bytes(rows.dtype, rows.x_format) % 16 == 0 &&
         rows.hidden * element_bytes(rows.dtype, rows.rows_format) % 16 == 0;
}
constexpr bool fits_low_latency(const HeapLayout& heap,
                                const CombineOp& op,
                                bool spans_domains = false) {
  return fits_low_latency(heap, op.shape) && op.num_scalars == 0 && op.hidden > 0 &&
         (spans_domains || !sums_over_domains(op)) && op.hidden * size_bytes(op.dtype) % 16 == 0;
}

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_LOW_LATENCY_FIT_H_
