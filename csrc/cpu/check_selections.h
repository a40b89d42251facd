// SPDX-License-Identifier: Apache-2.0
// Reading of routing and handle arrays. They reach an operation through arrays of the user's
// program, so nothing in them may be used as an index before it was checked here.
#ifndef JAX_EP_CSRC_CPU_CHECK_SELECTIONS_H_
#define JAX_EP_CSRC_CPU_CHECK_SELECTIONS_H_

#include <cstdint>

#include "csrc/core/ep_shape.h"
#include "csrc/core/status.h"

namespace jax_ep {

// Whether value is in [-1, limit), for 0 <= limit <= INT32_MAX.
constexpr bool in_range_or_none(int32_t value, int64_t limit) {
  return static_cast<int64_t>(value) + 1 >= 0 && value < limit;
}

// Whether a selection may be used: expert in [-1, E), slot in [-1, C), and no slot without an
// expert.
constexpr bool is_valid_selection(const EpShape& shape, int32_t expert, int32_t slot) {
  return in_range_or_none(expert, shape.num_experts) &&
         in_range_or_none(slot, shape.recv_capacity) && (expert >= 0 || slot < 0);
}

// "rank 1: topk_idx[5, 3] is 64, but must be -1 (no selection) or an expert in [0, 64)".
Status invalid_expert(const EpShape& shape, int32_t rank, int64_t token, int32_t k, int32_t expert);

// Why is_valid_selection() is false.
Status invalid_selection(
    const EpShape& shape, int32_t rank, int64_t token, int32_t k, int32_t expert, int32_t slot);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_CHECK_SELECTIONS_H_
