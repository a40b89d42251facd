// SPDX-License-Identifier: Apache-2.0
#include "csrc/runtime/tuning.h"

#include <algorithm>

#include "csrc/core/heap_layout.h"

namespace jax_ep {
namespace {

// Not measured on a GPU yet: what comparable libraries use on an NVLink domain of eight.
constexpr int32_t kPlanBlocks = 16;
constexpr int32_t kTransferBlocks = 24;

// Chunks, over all ranks, that are worth a block: of rows, and of scalars or routing alone.
constexpr int64_t kRowChunksPerBlock = 16;
constexpr int64_t kSmallChunksPerBlock = 64;

}  // namespace

LaunchShape launch_shape(OpKind op, const EpShape& shape, int64_t row_bytes, SmBudget budget) {
  const int32_t by_default = op == OpKind::kPlan ? kPlanBlocks : kTransferBlocks;
  const int32_t wanted = budget.wanted > 0 ? budget.wanted : by_default;
  const int64_t chunks = int64_t{num_chunks(shape.num_tokens)} * shape.num_ranks;
  const int64_t useful =
      ceil_div(chunks, row_bytes > 0 ? kRowChunksPerBlock : kSmallChunksPerBlock);
  const int64_t blocks = std::min<int64_t>({wanted, budget.available, useful});
  return {.num_blocks = static_cast<int32_t>(std::max<int64_t>(blocks, 1))};
}

}  // namespace jax_ep
