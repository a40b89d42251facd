// SPDX-License-Identifier: Apache-2.0
// A plan by counts: what its messages hold, and how many there are; docs/design/internode.md
// explains it. A rank tells all others how many selections of its tokens each bin has, then each
// domain the *runs* of its experts: an expert's run has an entry for each selection of it, in the
// order of the tokens. The runs of a rank follow each other in the order of the experts.
#ifndef JAX_EP_CSRC_CORE_COUNTS_PLAN_H_
#define JAX_EP_CSRC_CORE_COUNTS_PLAN_H_

#include <cstdint>

#include "csrc/core/ep_shape.h"
#include "csrc/core/limits.h"
#include "csrc/core/network_layout.h"
#include "csrc/core/topology.h"

namespace jax_ep {

// Messages to each other domain, the same for all: counts come first, then runs. Messages of runs
// are as many as they could need, and mostly one.
struct CountsPlanMessages {
  int64_t words;  // u32 words of a message at most
  int32_t counts;
  int32_t runs;

  [[nodiscard]] constexpr int32_t total() const { return counts + runs; }
};

constexpr CountsPlanMessages counts_plan_messages(const NetworkLayout& layout,
                                                  const Topology& topology,
                                                  const EpShape& shape) {
  const int64_t words = layout.buffer_bytes / 4;
  if (shape.num_tokens == 0) return {.words = words, .counts = 0, .runs = 0};
  const int64_t of_domain = int64_t{shape.num_local_experts()} * topology.num_scaleup_ranks;
  const int64_t selections = shape.num_topk < of_domain ? shape.num_topk : of_domain;
  const int64_t bins = num_bins(shape.layout, shape.num_experts, shape.num_ranks);
  return {.words = words,
          .counts = static_cast<int32_t>(ceil_div(bins, words)),
          .runs = static_cast<int32_t>(
              ceil_div(shape.num_tokens * selections * layout.run_words, words))};
}

// The first word of an entry: the token, and an index below kMaxTopk. That is, in layout "expert",
// how many experts of the same rank the token selects that come before; in layout "rank", k.
constexpr uint32_t run_entry(int64_t token, uint32_t index) {
  return static_cast<uint32_t>(token) * kMaxTopk + index;
}
constexpr int64_t token_of_run_entry(uint32_t entry) { return entry / kMaxTopk; }
constexpr uint32_t index_of_run_entry(uint32_t entry) { return entry % kMaxTopk; }
static_assert((kMaxTokens - 1) * kMaxTopk + kMaxTopk - 1 <= 0xFFFF'FFFF);

// The second one, in layout "rank" alone: how many tokens of the rank before this one have a row
// where it has, and whether no selection of the token before this one has the same row.
constexpr uint32_t run_entry_row(uint32_t tokens_before, bool leads) {
  return tokens_before * 2 + static_cast<uint32_t>(leads);
}
constexpr uint32_t tokens_before_run_entry(uint32_t word) { return word / 2; }
constexpr bool leads_run_entry(uint32_t word) { return word % 2 != 0; }

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_COUNTS_PLAN_H_
