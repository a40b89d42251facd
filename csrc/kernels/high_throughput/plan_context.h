// SPDX-License-Identifier: Apache-2.0
// What the steps of a plan share: the sizes of the call, and how a warp walks the tokens of a tile.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_CONTEXT_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_CONTEXT_H_

#include "csrc/device/chunk_parts.h"
#include "csrc/device/exchange.h"
#include "csrc/device/token_selections.h"
#include "csrc/device/warp_scan.h"
#include "csrc/kernels/high_throughput/plan_block.h"

namespace jax_ep::dev {

// A lane's selection, if it takes part: it names an expert, and none before it of its token names
// the same.
struct LaneSelection {
  i32 expert;       // -1: takes no part
  u32 same_expert;  // lanes whose selections name the same, those that take no part too
};

struct RowRange {
  u32 begin;
  u32 end;
};

struct CountedSelection {
  i32 bin;    // -1: this lane's selection takes no part
  u32 lanes;  // of each token in the bin, one
};

// All lanes. The counts of a bin, of which `count_of(item)` says where they are, become the sums of
// those before. Returns the sum of all.
template <typename CountOf>
JAX_EP_DEVICE u32 scan_counts(i32 num_items, const CountOf& count_of) {
  constexpr i32 kAtOnce = 4;  // loads in flight
  constexpr i32 kLanes = static_cast<i32>(kWarpSize);
  u32 total = 0;
  for (i32 first = 0; first < num_items; first += kAtOnce * kLanes) {
    const auto item_of = [first](i32 i) {
      return first + i * kLanes + static_cast<i32>(lane_id());
    };
    u32 count_here[kAtOnce];
    JAX_EP_UNROLL
    for (i32 i = 0; i < kAtOnce; ++i) {
      count_here[i] = item_of(i) < num_items ? ld(count_of(item_of(i))) : 0;
    }
    JAX_EP_UNROLL
    for (i32 i = 0; i < kAtOnce; ++i) {
      const u32 sum = inclusive_sum(count_here[i]);
      if (item_of(i) < num_items) st(count_of(item_of(i)), total + sum - count_here[i]);
      total += warp_shfl(sum, kWarpSize - 1);
    }
  }
  return total;
}

template <typename Config>
struct PlanContext {
  using Warps = typename Config::Warps;
  using Tables = typename Config::Tables;

  // `warps`: those of each main block that take part; they call all that is here.
  JAX_EP_DEVICE PlanContext(const PlanOp& op,
                            const Exchange& exchange,
                            const Warps& warps,
                            Layout layout)
      : PlanContext(op,
                    exchange,
                    warps,
                    layout,
                    tile_tokens(op.shape.num_tokens, exchange.view().num_ranks)) {}

  // With tiles of so many tokens of a source.
  JAX_EP_DEVICE PlanContext(const PlanOp& op,
                            const Exchange& exchange,
                            const Warps& warps,
                            Layout layout,
                            i32 tokens_per_tile)
      : op(op),
        shape(op.shape),
        exchange(exchange),
        warps(warps),
        tables(warps),
        rank(exchange.view().rank),
        num_ranks(exchange.view().num_ranks),
        num_topk(shape.num_topk),
        num_tokens(static_cast<i32>(shape.num_tokens)),
        num_local(shape.num_local_experts()),
        max_rows(max_rows_per_token(layout, num_topk, num_local)),
        bins(num_bins(layout, shape.num_experts, num_ranks)),
        bin_bits(num_bits(static_cast<u32>(bins))),
        tokens_per_tile(tokens_per_tile),
        tiles(static_cast<i32>(ceil_div(shape.num_tokens, tokens_per_tile))),
        num_items(num_ranks * tiles),
        chunks(OpKind::kPlan, shape.num_tokens, exchange.view().chunk_target),
        capacity(static_cast<u32>(shape.recv_capacity)),
        // Neighboring items to different blocks.
        warp(static_cast<i32>(warps.warp() * exchange.num_main() + block_id())),
        num_warps(static_cast<i32>(exchange.num_main() * warps.count())),
        run_tokens(static_cast<i32>(kWarpSize) / num_topk),
        lane_token(static_cast<i32>(lane_id()) / num_topk),
        first_lane(static_cast<u32>(lane_token * num_topk)),
        token_lanes(~0U >> (static_cast<i32>(kWarpSize) - num_topk) << first_lane) {}

  JAX_EP_DEVICE bool is_expert(i32 expert) const {
    if (expert < 0 || expert >= shape.num_experts) return false;
    return all_active(exchange.view()) || is_active(exchange.view(), owner_of(expert, num_local));
  }
  JAX_EP_DEVICE bool is_local(i32 expert) const {
    return static_cast<u32>(expert - rank * num_local) < static_cast<u32>(num_local);
  }
  JAX_EP_DEVICE u32 clip(u64 row) const {
    return row < capacity ? static_cast<u32>(row) : capacity;
  }
  // What a selection's slot says of its row.
  JAX_EP_DEVICE i32 slot_of(u32 row) const { return row < capacity ? static_cast<i32>(row) : -1; }

  // --- a lane per selection --------------------------------------------------------------------
  // A warp takes as many consecutive tokens at once as have no more selections than it has lanes: a
  // run. Each lane holds one selection.

  struct TokenTile {
    i32 source;
    i32 first;  // token
    i32 last;
    bool active;  // or the source takes no part: its tokens have no selections
  };
  JAX_EP_DEVICE TokenTile tile_of(i32 item) const {
    const i32 first = item % tiles * tokens_per_tile;
    const i32 last = first + tokens_per_tile;
    const i32 source = item / tiles;
    return {.source = source,
            .first = first,
            .last = last < num_tokens ? last : num_tokens,
            .active = is_active(exchange.view(), source)};
  }

  JAX_EP_DEVICE bool has_token(const TokenTile& tile, i32 first) const {
    return lane_token < run_tokens && first + lane_token < tile.last;
  }

  // `use(first, expert)` for every run of a tile: its first token, and this lane's expert or -1.
  template <typename Use>
  JAX_EP_DEVICE void for_each_run(const TokenTile& tile, const Use& use) const {
    for_each_run(tile, as<const i32>(routing(tile.source, 0)), use);
  }
  // The same, where the routing of the source's tokens lies somewhere else.
  template <typename Use>
  JAX_EP_DEVICE void for_each_run(const TokenTile& tile,
                                  Ptr<const i32> routing_of_source,
                                  const Use& use) const {
    const auto load = [this, &tile, routing_of_source](i32 first) {
      const bool has_selection = has_token(tile, first) && tile.active;
      return has_selection ? ld(routing_of_source + (i64{first} * num_topk + lane_id())) : -1;
    };
    i32 ahead = load(tile.first);
    for (i32 first = tile.first; first < tile.last; first += run_tokens) {
      const i32 expert = ahead;
      ahead = load(first + run_tokens);
      use(first, is_expert(expert) ? expert : -1);
    }
  }

  JAX_EP_DEVICE Ptr<i32> routing(i32 source, i32 token) const {
    return staged_routing(exchange.view(), rank, source, token, num_topk);
  }

  // All lanes.
  JAX_EP_DEVICE LaneSelection selection_of(i32 expert) const {
    const u32 earlier = token_lanes & lanes_below(lane_id());
    const u32 same_expert = lanes_alike(static_cast<u32>(expert + 1), bin_bits);
    const bool repeats = (same_expert & earlier) != 0;
    return {expert < 0 || repeats ? -1 : expert, same_expert};
  }

  // All lanes: each names a bin or -1, and the lanes that name the same, or more that name none.
  JAX_EP_DEVICE CountedSelection counted(i32 bin, u32 same_bin) const {
    const u32 earlier = token_lanes & lanes_below(lane_id());
    const bool leads = bin >= 0 && (same_bin & earlier) == 0;
    return {bin, same_bin & warp_ballot(leads)};
  }

  // Of the run, those of a lane's bin that come before its token.
  JAX_EP_DEVICE u32 tokens_before(const CountedSelection& counted) const {
    return count_bits(counted.lanes & lanes_below(first_lane));
  }

  // All lanes, and then a warp_sync.
  JAX_EP_DEVICE void clear_cursors() const {
    for (i32 bin = static_cast<i32>(lane_id()); bin < bins; bin += kWarpSize) {
      tables.cursor(bin) = 0;
    }
  }
  // The same; what they have counted goes where `count_of(bin)` says.
  template <typename CountOf>
  JAX_EP_DEVICE void take_cursors(const CountOf& count_of) const {
    for (i32 bin = static_cast<i32>(lane_id()); bin < bins; bin += kWarpSize) {
      auto& cursor = tables.cursor(bin);
      st(count_of(bin), cursor);
      cursor = 0;
    }
  }
  // All lanes: moves the cursors past the run.
  JAX_EP_DEVICE void advance(const CountedSelection& counted) {
    if (counted.bin >= 0 && lowest_bit(counted.lanes) == lane_id()) {
      auto& cursor = tables.cursor(counted.bin);
      cursor = cursor + count_bits(counted.lanes);
    }
    warp_sync();
  }

  // --- counts, and totals over all tiles -------------------------------------------------------

  JAX_EP_DEVICE Ptr<u32> count_of(i32 bin, i32 item) const {
    return region<u32>(exchange.view(), rank, Region::kCounts) + (i64{bin} * num_items + item);
  }
  JAX_EP_DEVICE Ptr<u32> totals() const { return tables.totals(exchange.view()); }
  // Selections of a local expert of this rank, which it reports.
  JAX_EP_DEVICE u32 report_total(i32 local) const {
    const u32 total = ld(totals() + (rank * num_local + local));
    st(Ptr<i32>{op.tokens_per_expert} + local, static_cast<i32>(total));
    return total;
  }

  const PlanOp& op;
  const EpShape& shape;
  const Exchange exchange;
  const Warps warps;
  const Tables tables;
  const i32 rank;
  const i32 num_ranks;
  const i32 num_topk;
  const i32 num_tokens;
  const i32 num_local;
  const i32 max_rows;  // that a rank holds of a token
  const i32 bins;
  const u32 bin_bits;  // of a bin's number plus 1
  const i32 tokens_per_tile;
  const i32 tiles;
  const i32 num_items;  // tiles of all sources
  const Chunks chunks;
  const u32 capacity;
  const i32 warp;  // among all blocks
  const i32 num_warps;
  const i32 run_tokens;
  const i32 lane_token;   // this lane's, in a run; there may be none
  const u32 first_lane;   // of that token
  const u32 token_lanes;  // as bits
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_CONTEXT_H_
