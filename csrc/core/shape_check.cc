// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/shape_check.h"

#include <limits>
#include <string>

namespace jax_ep {

Status out_of_range(std::string_view name, int64_t value, std::string_view allowed) {
  return Status::invalid_argument(std::string(name) + " is " + std::to_string(value) +
                                  "; allowed: " + std::string(allowed));
}

Status check_shape(const EpShape& shape) {
  // Rows and tokens of all ranks are counted in int32.
  constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();
  if (shape.num_ranks < 1) return out_of_range("num_ranks", shape.num_ranks, "1 or more");
  if (shape.num_experts < 1 || shape.num_experts % shape.num_ranks != 0) {
    return out_of_range("num_experts",
                        shape.num_experts,
                        "a positive multiple of num_ranks, " + std::to_string(shape.num_ranks));
  }
  if (shape.num_topk < 1 || shape.num_topk > shape.num_experts) {
    return out_of_range(
        "num_topk", shape.num_topk, "1 to num_experts, " + std::to_string(shape.num_experts));
  }
  if (shape.num_tokens < 0 || shape.num_tokens > kMaxIndex / shape.num_ranks) {
    return out_of_range(
        "num_tokens",
        shape.num_tokens,
        "0 to (2^31 - 1) / num_ranks, with num_ranks = " + std::to_string(shape.num_ranks));
  }
  if (shape.recv_capacity < 0 || shape.recv_capacity > kMaxIndex) {
    return out_of_range("recv_capacity", shape.recv_capacity, "0 to 2^31 - 1");
  }
  if (shape.layout != Layout::kExpert && shape.layout != Layout::kRank) {
    return out_of_range("layout", static_cast<int64_t>(shape.layout), "0 (expert), 1 (rank)");
  }
  const bool aligned = shape.layout == Layout::kExpert;
  if (shape.expert_alignment < 1 || (!aligned && shape.expert_alignment != 1)) {
    return out_of_range("expert_alignment",
                        shape.expert_alignment,
                        aligned ? "1 or more" : "1 where layout is rank");
  }
  return {};
}

Status check_row_formats(const DispatchOp& op) {
  if (op.wire == Wire::kFloat8E4M3) return {};
  const bool of_x = op.x_format != RowFormat::kDType;
  if (!of_x && op.rows_format == RowFormat::kDType) return {};
  return Status::invalid_argument(std::string(of_x ? "x is " : "rows is ") +
                                  std::string(name(RowFormat::kFloat8E4M3)) + ", but wire is " +
                                  std::string(name(op.wire)) + "; allowed: wire float8_e4m3fn");
}

Status check_domains(const CombineOp& op) {
  const int32_t num_ranks = op.shape.num_ranks;
  if (op.domain_size >= 0 && (op.domain_size == 0 || num_ranks % op.domain_size == 0)) return {};
  return out_of_range(
      "domain_size", op.domain_size, "0, or a divisor of num_ranks, " + std::to_string(num_ranks));
}

Status check_products(const DispatchOp& op) {
  if (op.wire == Wire::kSame || (!op.weighted && !op.with_dots)) return {};
  return Status::invalid_argument(std::string(op.weighted ? "row_weights" : "y") +
                                  " is given, and wire is " + std::string(name(op.wire)) +
                                  "; allowed: wire " + std::string(name(Wire::kSame)));
}

}  // namespace jax_ep
