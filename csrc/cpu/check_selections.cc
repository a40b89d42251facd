// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/check_selections.h"

#include <string>

namespace jax_ep {
namespace {

std::string element(int32_t rank, const char* buffer, int64_t token, int32_t k) {
  return "rank " + std::to_string(rank) + ": " + buffer + "[" + std::to_string(token) + ", " +
         std::to_string(k) + "]";
}

}  // namespace

Status invalid_expert(
    const EpShape& shape, int32_t rank, int64_t token, int32_t k, int32_t expert) {
  return Status::invalid_argument(element(rank, "topk_idx", token, k) + " is " +
                                  std::to_string(expert) +
                                  ", but must be -1 (no selection) or an expert in [0, " +
                                  std::to_string(shape.num_experts) + ")");
}

Status invalid_selection(
    const EpShape& shape, int32_t rank, int64_t token, int32_t k, int32_t expert, int32_t slot) {
  if (!in_range_or_none(expert, shape.num_experts)) {
    return invalid_expert(shape, rank, token, k, expert);
  }
  const std::string what = element(rank, "slot", token, k) + " is " + std::to_string(slot);
  if (!in_range_or_none(slot, shape.recv_capacity)) {
    return Status::invalid_argument(what + ", but must be -1 (no row) or a row in [0, " +
                                    std::to_string(shape.recv_capacity) + ")");
  }
  return Status::invalid_argument(what + ", but topk_idx there is -1 (no selection): slot and " +
                                  "topk_idx must come from the same plan");
}

}  // namespace jax_ep
