// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CORE_EP_SHAPE_H_
#define JAX_EP_CSRC_CORE_EP_SHAPE_H_

#include <cstdint>
#include <string_view>

namespace jax_ep {

enum class Layout : int32_t {
  kExpert = 0,  // one row per selection, sorted by (local expert, source rank, source token)
  kRank = 1,    // one row per (token, destination rank), sorted by (source rank, source token)
};

constexpr std::string_view name(Layout layout) {
  return layout == Layout::kExpert ? "expert" : "rank";
}

// The static sizes of one EP operation: the same on every rank of a group, or the operation
// is refused. The letters are those of the public documentation.
struct EpShape {
  int32_t num_ranks = 1;         // R
  int32_t num_experts = 1;       // E, a multiple of R
  int32_t num_topk = 1;          // K
  int64_t num_tokens = 0;        // T, tokens of each rank in this call; may be 0
  int64_t recv_capacity = 0;     // C, rows of each rank's receive buffer
  int32_t expert_alignment = 1;  // rows; every expert starts at a multiple (kExpert only)
  Layout layout = Layout::kExpert;

  [[nodiscard]] constexpr int32_t num_local_experts() const {
    return num_experts / num_ranks;
  }  // L
  // Groups of rows in a receive buffer: local experts (kExpert) or source ranks (kRank).
  [[nodiscard]] constexpr int32_t num_row_groups() const {
    return layout == Layout::kExpert ? num_local_experts() : num_ranks;
  }
  // Scalars (weights) that each received row carries: one (kExpert), or one per k (kRank).
  [[nodiscard]] constexpr int32_t scalars_per_row() const {
    return layout == Layout::kExpert ? 1 : num_topk;
  }
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_EP_SHAPE_H_
