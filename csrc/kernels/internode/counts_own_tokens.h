// SPDX-License-Identifier: Apache-2.0
// What a plan by counts does with the tokens of its own rank: counts their selections, and when it
// knows where each run of the rank begins at its destination, gives them their slots and sorts them
// into runs.
#ifndef JAX_EP_CSRC_KERNELS_INTERNODE_COUNTS_OWN_TOKENS_H_
#define JAX_EP_CSRC_KERNELS_INTERNODE_COUNTS_OWN_TOKENS_H_

#include "csrc/kernels/high_throughput/plan_context.h"
#include "csrc/kernels/internode/counts_tables.h"

namespace jax_ep::dev {

// `RowLayout` is PlanExpertLayout or PlanRankLayout.
template <typename RowLayout>
class CountsOwnTokens {
  using Context = typename RowLayout::Context;

 public:
  JAX_EP_DEVICE CountsOwnTokens(Context& context, const CountsTables& tables)
      : c_(context),
        layout_(context),
        tables_(tables),
        tokens_per_tile_(tile_tokens(context.num_tokens, 1)) {}

  // Selections per tile and bin.
  JAX_EP_DEVICE void count() {
    c_.clear_cursors();
    for (i32 tile = c_.warp; tile < tables_.num_tiles(); tile += c_.num_warps) {
      warp_sync();
      c_.for_each_run(tile_of(tile), Ptr<const i32>{c_.op.topk_idx}, [this](i32, i32 expert) {
        layout_.count(c_.selection_of(expert));
      });
      c_.take_cursors([this, tile](i32 bin) { return tables_.tile_count(bin, tile); });
    }
  }

  // Per bin: counts become the number of selections in earlier tiles; all of them are what the rank
  // tells the others, once these have read what it told them before.
  JAX_EP_DEVICE void scan() {
    if (c_.warp >= c_.bins) return;
    c_.exchange.wait_until_writable();
    for (i32 bin = c_.warp; bin < c_.bins; bin += c_.num_warps) {
      const u32 total = scan_counts(
          tables_.num_tiles(), [this, bin](i32 tile) { return tables_.tile_count(bin, tile); });
      if (lane_id() == 0) st(tables_.own_counts() + bin, total);
    }
  }

  // Slots and runs. Behind a grid barrier after `scan`, and where rows and runs begin are known.
  JAX_EP_DEVICE void assign() {
    for (i32 tile = c_.warp; tile < tables_.num_tiles(); tile += c_.num_warps) {
      for (i32 bin = static_cast<i32>(lane_id()); bin < c_.bins; bin += kWarpSize) {
        c_.tables.cursor(bin) = ld(tables_.tile_count(bin, tile));
      }
      warp_sync();
      const typename Context::TokenTile tokens = tile_of(tile);
      c_.for_each_run(tokens, Ptr<const i32>{c_.op.topk_idx}, [&](i32 first, i32 expert) {
        assign(tokens, first, expert);
      });
    }
  }

 private:
  static constexpr bool kIsRankMajor = RowLayout::kLayout == Layout::kRank;

  JAX_EP_DEVICE typename Context::TokenTile tile_of(i32 tile) const {
    const i32 first = tile * tokens_per_tile_;
    const i32 last = first + tokens_per_tile_;
    return {.source = c_.rank,
            .first = first,
            .last = last < c_.num_tokens ? last : c_.num_tokens,
            .active = true};
  }

  // All lanes: a run of tokens.
  JAX_EP_DEVICE void assign(const typename Context::TokenTile& tile, i32 first, i32 expert) {
    const LaneSelection selection = c_.selection_of(expert);
    const CountedSelection of_row = layout_.take(selection, true);
    const CountedSelection of_expert = c_.counted(selection.expert, selection.same_expert);
    const u32 index = kIsRankMajor ? lane_id() - c_.first_lane : experts_before(selection.expert);
    u32 row = c_.capacity;
    if (selection.expert >= 0) {
      const u32 before = c_.tables.cursor(of_row.bin) + c_.tokens_before(of_row);
      row = c_.clip(u64{layout_.start_of(of_row.bin)} + ld(c_.count_of(of_row.bin, c_.rank)) +
                    before);
      const i64 position = i64{ld(tables_.starts() + selection.expert)} +
                           c_.tables.cursor(selection.expert) + c_.tokens_before(of_expert);
      const bool leads = (of_row.lanes >> lane_id() & 1) != 0;
      put_entry(position, run_entry(first + c_.lane_token, index), run_entry_row(before, leads));
    }
    if (c_.has_token(tile, first)) {
      st(Ptr<i32>{c_.op.slot} + (i64{first} * c_.num_topk + lane_id()), c_.slot_of(row));
    }
    warp_sync();  // all cursors are read before one moves
    layout_.count(selection);
  }

  // All lanes: of the token's experts, those of the same rank that come before.
  JAX_EP_DEVICE u32 experts_before(i32 expert) const {
    const i32 owner = expert >= 0 ? owner_of(expert, c_.num_local) : -1;
    u32 before = 0;
    for (i32 k = 0; k < c_.num_topk; ++k) {
      const u32 lane = (c_.first_lane + static_cast<u32>(k)) % kWarpSize;
      const auto other = static_cast<i32>(warp_shfl(static_cast<u32>(expert), lane));
      before +=
          static_cast<u32>(other >= 0 && other < expert && owner_of(other, c_.num_local) == owner);
    }
    return before;
  }

  JAX_EP_DEVICE void put_entry(i64 position, u32 first_word, u32 second_word) const {
    if constexpr (kIsRankMajor) {
      st(tables_.own_runs() + 2 * position, first_word);
      st(tables_.own_runs() + (2 * position + 1), second_word);
    } else {
      st(tables_.own_runs() + position, first_word);
    }
  }

  Context& c_;
  const RowLayout layout_;
  const CountsTables& tables_;
  const i32 tokens_per_tile_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_INTERNODE_COUNTS_OWN_TOKENS_H_
