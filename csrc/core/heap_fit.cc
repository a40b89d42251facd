// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/heap_fit.h"

#include <string>
#include <string_view>

namespace jax_ep {
namespace {

Status differs(std::string_view name, const std::string& call, const std::string& group) {
  return Status::invalid_argument(std::string(name) + " is " + call + ", but the group has " +
                                  group);
}

Status check_same(std::string_view name, int32_t call, int32_t group) {
  if (call == group) return {};
  return differs(name, std::to_string(call), std::to_string(group));
}

}  // namespace

Status check_fits(const HeapShape& heap, const EpShape& shape) {
  JAX_EP_RETURN_IF_ERROR(check_same("num_ranks", shape.num_ranks, heap.num_ranks));
  JAX_EP_RETURN_IF_ERROR(check_same("num_experts", shape.num_experts, heap.num_experts));
  JAX_EP_RETURN_IF_ERROR(check_same("num_topk", shape.num_topk, heap.num_topk));
  if (shape.layout != heap.layout) {
    return differs("layout", std::string(name(shape.layout)), std::string(name(heap.layout)));
  }
  if (shape.num_tokens > heap.max_tokens) {
    return Status::invalid_argument(std::to_string(shape.num_tokens) +
                                    " tokens do not fit; the group's max_tokens_per_rank is " +
                                    std::to_string(heap.max_tokens));
  }
  return {};
}

Status check_rows_fit(const HeapShape& heap, int64_t hidden, DType dtype, Wire wire) {
  if (wire == Wire::kFloat8E4M3 && heap.wire != Wire::kFloat8E4M3) {
    return Status::invalid_argument("wire is float8_e4m3fn, but the group's wire_dtype is not");
  }
  const auto text = [](int64_t elements, DType of) {
    return std::to_string(elements) + " " + std::string(name(of));
  };
  if (hidden * size_bytes(dtype) > heap.hidden * size_bytes(heap.dtype) ||
      (wire == Wire::kFloat8E4M3 && hidden > heap.hidden)) {
    return Status::invalid_argument("rows of " + text(hidden, dtype) +
                                    " do not fit; the group has room for " +
                                    text(heap.hidden, heap.dtype));
  }
  return {};
}

}  // namespace jax_ep
