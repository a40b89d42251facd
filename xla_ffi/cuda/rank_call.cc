// SPDX-License-Identifier: Apache-2.0
#include "xla_ffi/cuda/rank_call.h"

#include "csrc/core/heap_fit.h"
#include "csrc/core/row_alignment.h"
#include "csrc/core/shape_check.h"
#include "csrc/runtime/cuda_registry.h"

namespace jax_ep {

Status find_rank(const EpAttrs& attrs, OpKind op, const EpShape& shape, RankCall& call) {
  JAX_EP_RETURN_IF_ERROR(
      CudaGroupRegistry::instance().find_open(attrs.group_id, name(op), call.group));
  JAX_EP_RETURN_IF_ERROR(call.group->find(call.device, call.rank));
  JAX_EP_RETURN_IF_ERROR(call.rank->error());
  return check_fits(call.heap(), shape);
}

Status check_rows(const HeapShape& heap, const DispatchOp& op) {
  JAX_EP_RETURN_IF_ERROR(check_rows_fit(heap, op.hidden, op.dtype, op.wire));
  const int64_t row_bytes = op.hidden * size_bytes(op.dtype);
  const int64_t min_bytes = op.wire == Wire::kFloat8E4M3 ? op.hidden : row_bytes;
  JAX_EP_RETURN_IF_ERROR(check_rows_aligned("x", op.x, op.shape.num_tokens, min_bytes));
  if (op.with_dots) {
    JAX_EP_RETURN_IF_ERROR(check_rows_aligned("y", op.y, op.shape.recv_capacity, row_bytes));
  }
  return check_rows_aligned("rows", op.rows, op.shape.recv_capacity, min_bytes);
}

Status check_rows(const HeapShape& heap, const CombineOp& op) {
  JAX_EP_RETURN_IF_ERROR(check_rows_fit(heap, op.hidden, op.dtype, Wire::kSame));
  const int64_t row_bytes = row_bytes_of(op);
  JAX_EP_RETURN_IF_ERROR(check_rows_aligned("y", op.y, op.shape.recv_capacity, row_bytes));
  return check_rows_aligned("out", op.out, op.shape.num_tokens, row_bytes);
}

Status say_nobody_is_missing(const RankCall& call, uint8_t* missing_ranks) {
  if (missing_ranks == nullptr) return {};
  if (call.spans_domains()) {
    return Status::invalid_argument(
        "on_timeout is \"mask\", and the group spans several domains; allowed: one domain");
  }
  const DeviceGuard guard(call.device);
  JAX_EP_RETURN_IF_ERROR(guard.status());
  const auto ranks = static_cast<size_t>(call.heap().num_ranks);
  return JAX_EP_CUDA_STATUS(cudaMemsetAsync(missing_ranks, 0, ranks, call.stream));
}

Status check_domain_size(const HeapShape& heap, const CombineOp& op) {
  const int32_t ranks = heap.topology().num_scaleup_ranks;
  if (!heap.spans_domains() || op.domain_size == ranks) return {};
  return out_of_range("domain_size",
                      op.domain_size,
                      std::to_string(ranks) + ", the ranks of each of the group's domains");
}

}  // namespace jax_ep
