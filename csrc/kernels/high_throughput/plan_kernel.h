// SPDX-License-Identifier: Apache-2.0
// Plan: every rank gathers the routing of all ranks, counts it tile by tile, and turns the counts
// into rows by prefix sums. Each rank works out both sides: the slots of its own selections, and
// what its own rows hold. One exchange, and no order depends on an atomic.
//
// Steps, with a grid barrier between 2, 3 and 4:
//   1. send      each chunk of topk_idx goes to all ranks
//   2. count     selections per (source rank, tile, bin), as the chunks arrive
//   3. scan      per bin: counts become the number of earlier selections of the bin
//   4. assign    every tile walks its tokens and hands out rows in their order
// Bins are the experts; in layout "rank" the destination ranks follow, which count tokens.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_KERNEL_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_KERNEL_H_

#include "csrc/device/exchange.h"
#include "csrc/device/token_selections.h"
#include "csrc/device/warp_scan.h"
#include "csrc/kernels/high_throughput/plan_config.h"

namespace jax_ep::dev {

template <typename Config>
class PlanKernel {
 public:
  JAX_EP_DEVICE explicit PlanKernel(const PlanParams& params)
      : params_(params),
        shape_(params.op.shape),
        exchange_(params.view,
                  Channel::kHighThroughput,
                  OpKind::kPlan,
                  params.call_tag,
                  params.program_rank),
        memory_(shared<typename Config::SharedStorage>()),
        rank_(params.view.rank),
        num_ranks_(params.view.num_ranks),
        num_topk_(shape_.num_topk),
        num_tokens_(static_cast<i32>(shape_.num_tokens)),
        num_local_(shape_.num_local_experts()),
        num_bins_(num_bins(shape_.layout, shape_.num_experts, num_ranks_)),
        bin_bits_(num_bits(static_cast<u32>(num_bins_))),
        tile_tokens_(tile_tokens(shape_.num_tokens, num_ranks_)),
        num_tiles_(num_tiles(shape_.num_tokens, num_ranks_)),
        num_items_(num_ranks_ * num_tiles_),
        capacity_(static_cast<u32>(shape_.recv_capacity)),
        // Neighboring items to different blocks.
        warp_(static_cast<i32>(warp_id() * num_blocks() + block_id())),
        num_warps_(static_cast<i32>(num_blocks() * Config::kWarps)),
        run_tokens_(static_cast<i32>(kWarpSize) / num_topk_),
        lane_token_(static_cast<i32>(lane_id()) / num_topk_),
        first_lane_(static_cast<u32>(lane_token_ * num_topk_)),
        token_lanes_(~0U >> (static_cast<i32>(kWarpSize) - num_topk_) << first_lane_) {}

  JAX_EP_DEVICE void run() {
    if (exchange_.closed()) return leave_no_results();
    send();
    clear_cursors();
    for (i32 item = warp_; item < num_items_; item += num_warps_) count(item);
    exchange_.grid_barrier();
    for (i32 bin = warp_; bin < num_bins_; bin += num_warps_) scan(bin);
    exchange_.grid_barrier();
    start_experts();
    block_sync();
    for (i32 item = warp_; item < num_items_; item += num_warps_) assign(item);
    write_counts();
    clear_rows_without_token();
    exchange_.finish();
  }

 private:
  JAX_EP_DEVICE bool is_rank_major() const { return shape_.layout == Layout::kRank; }
  JAX_EP_DEVICE i32 rank_bin(i32 rank) const { return shape_.num_experts + rank; }
  JAX_EP_DEVICE bool is_expert(i32 expert) const {
    if (expert < 0 || expert >= shape_.num_experts) return false;
    return all_active(exchange_.view()) ||
           is_active(exchange_.view(), owner_of(expert, num_local_));
  }

  // --- 1. send -------------------------------------------------------------------------------

  JAX_EP_DEVICE void send() {
    const i32 chunks = num_chunks(num_tokens_, params_.view.chunk_target);
    const i32 tokens = chunk_tokens(num_tokens_, params_.view.chunk_target);
    if (warp_ >= chunks) return;
    exchange_.wait_until_writable();
    for (i32 chunk = warp_; chunk < chunks; chunk += num_warps_) {
      const i64 first = i64{chunk} * tokens;
      const i64 last = first + tokens < num_tokens_ ? first + tokens : num_tokens_;
      const i64 elements = (last - first) * num_topk_;
      const auto from = Ptr<const i32>{params_.op.topk_idx} + first * num_topk_;
      for (i64 i = lane_id(); i < elements; i += kWarpSize) {
        const i32 expert = ld(from + i);
        for_each_peer(exchange_.view(), [this, first, i, expert](i32 peer) {
          put_expert(exchange_.view(), peer, first, num_topk_, i, expert);
        });
      }
      exchange_.signal_arrived(chunk);
    }
  }

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
    const i32 first = item % num_tiles_ * tile_tokens_;
    const i32 last = first + tile_tokens_;
    const i32 source = item / num_tiles_;
    return {.source = source,
            .first = first,
            .last = last < num_tokens_ ? last : num_tokens_,
            .active = is_active(exchange_.view(), source)};
  }

  JAX_EP_DEVICE bool has_token(const TokenTile& tile, i32 first) const {
    return lane_token_ < run_tokens_ && first + lane_token_ < tile.last;
  }

  // `use(first, expert)` for every run of a tile: its first token, and this lane's expert or -1.
  template <typename Use>
  JAX_EP_DEVICE void for_each_run(const TokenTile& tile, const Use& use) const {
    const auto load = [this, &tile](i32 first) {
      const bool has_selection = has_token(tile, first) && tile.active;
      return has_selection ? ld(routing(tile.source, first) + lane_id()) : -1;
    };
    i32 ahead = load(tile.first);
    for (i32 first = tile.first; first < tile.last; first += run_tokens_) {
      const i32 expert = ahead;
      ahead = load(first + run_tokens_);
      use(first, is_expert(expert) ? expert : -1);
    }
  }

  JAX_EP_DEVICE Ptr<i32> routing(i32 source, i32 token) const {
    return staged_routing(exchange_.view(), rank_, source, token, num_topk_);
  }

  // The bin whose count gives a selection its row.
  JAX_EP_DEVICE i32 row_bin(i32 expert) const {
    return is_rank_major() ? rank_bin(owner_of(expert, num_local_)) : expert;
  }

  struct CountedSelection {
    i32 bin;    // -1: this lane's selection takes no part
    u32 lanes;  // of each token in the bin, one
  };

  // All lanes. A selection that repeats an earlier one of its token takes no part, nor does one
  // whose `bin_of(expert)` is negative.
  template <typename BinOf>
  JAX_EP_DEVICE CountedSelection take(i32 expert, const BinOf& bin_of) const {
    const u32 earlier = token_lanes_ & lanes_below(lane_id());
    const u32 same_expert = lanes_alike(static_cast<u32>(expert + 1), bin_bits_);
    const bool repeats = (same_expert & earlier) != 0;
    const i32 bin = expert < 0 || repeats ? -1 : bin_of(expert);
    const u32 same_bin =
        is_rank_major() ? lanes_alike(static_cast<u32>(bin + 1), bin_bits_) : same_expert;
    const bool leads = bin >= 0 && (same_bin & earlier) == 0;
    return {bin, same_bin & warp_ballot(leads)};
  }

  // All lanes: moves the cursors past the run.
  JAX_EP_DEVICE void advance(const CountedSelection& counted) {
    if (counted.bin >= 0 && lowest_bit(counted.lanes) == lane_id()) {
      auto& cursor = memory_.cursor[warp_id()][counted.bin];
      cursor = cursor + count_bits(counted.lanes);
    }
    warp_sync();
  }

  // --- 2. count ------------------------------------------------------------------------------

  // `count` begins with a warp_sync.
  JAX_EP_DEVICE void clear_cursors() {
    for (i32 bin = static_cast<i32>(lane_id()); bin < num_bins_; bin += kWarpSize) {
      memory_.cursor[warp_id()][bin] = 0;
    }
  }

  JAX_EP_DEVICE Ptr<u32> count_of(i32 bin, i32 item) const {
    return region<u32>(exchange_.view(), rank_, Region::kCounts) + (i64{bin} * num_items_ + item);
  }
  JAX_EP_DEVICE Ptr<u32> totals() const {
    return region<u32>(exchange_.view(), rank_, Region::kTotals);
  }

  JAX_EP_DEVICE void count(i32 item) {
    const TokenTile tile = tile_of(item);
    const i32 tokens = chunk_tokens(num_tokens_, params_.view.chunk_target);
    const i32 last_chunk = (tile.last - 1) / tokens;
    for (i32 chunk = tile.first / tokens + static_cast<i32>(lane_id());
         chunk <= last_chunk && tile.active;
         chunk += kWarpSize) {
      exchange_.wait_arrived(tile.source, chunk);
    }
    warp_sync();
    for_each_run(tile, [this](i32, i32 expert) {
      advance(take(expert, [this](i32 e) { return row_bin(e); }));
      // Layout "rank" hands out rows by rank, but reports selections by expert.
      if (is_rank_major()) advance(take(expert, [](i32 e) { return e; }));
    });
    for (i32 bin = static_cast<i32>(lane_id()); bin < num_bins_; bin += kWarpSize) {
      auto& cursor = memory_.cursor[warp_id()][bin];
      st(count_of(bin, item), cursor);
      cursor = 0;
    }
  }

  // --- 3. scan -------------------------------------------------------------------------------

  JAX_EP_DEVICE void scan(i32 bin) {
    constexpr i32 kAtOnce = 4;  // loads in flight
    u32 total = 0;
    for (i32 first = 0; first < num_items_; first += kAtOnce * static_cast<i32>(kWarpSize)) {
      u32 count_here[kAtOnce];
      JAX_EP_UNROLL
      for (i32 i = 0; i < kAtOnce; ++i) {
        const i32 item = item_of_lane(first, i);
        count_here[i] = item < num_items_ ? ld(count_of(bin, item)) : 0;
      }
      JAX_EP_UNROLL
      for (i32 i = 0; i < kAtOnce; ++i) {
        const i32 item = item_of_lane(first, i);
        const u32 sum = inclusive_sum(count_here[i]);
        if (item < num_items_) st(count_of(bin, item), total + sum - count_here[i]);
        total += warp_shfl(sum, kWarpSize - 1);
      }
    }
    if (lane_id() == 0) st(totals() + bin, total);
  }
  JAX_EP_DEVICE static i32 item_of_lane(i32 first, i32 step) {
    return first + step * static_cast<i32>(kWarpSize) + static_cast<i32>(lane_id());
  }

  // --- 4. assign -----------------------------------------------------------------------------

  JAX_EP_DEVICE u32 clip(u64 row) const {
    return row < capacity_ ? static_cast<u32>(row) : capacity_;
  }

  // Where each expert's rows start at its rank: a warp per rank. Sums are clipped to the capacity
  // at every step, so that they fit 32 bits.
  JAX_EP_DEVICE void start_experts() {
    const u64 alignment = static_cast<u64>(shape_.expert_alignment);
    const auto clipped_sum = [this](u32 a, u32 b) { return clip(u64{a} + b); };
    for (i32 rank = static_cast<i32>(warp_id()); rank < num_ranks_ && !is_rank_major();
         rank += Config::kWarps) {
      u32 start = 0;
      for (i32 first = 0; first < num_local_; first += kWarpSize) {
        const i32 local = first + static_cast<i32>(lane_id());
        const u64 total = local < num_local_ ? ld(totals() + (rank * num_local_ + local)) : 0;
        const u32 rows = clip((total + alignment - 1) / alignment * alignment);
        const u32 sum = inclusive_sum(rows, clipped_sum);
        const u32 before = from_lane_before(sum);
        if (local < num_local_) {
          memory_.start[rank * num_local_ + local] = clipped_sum(start, before);
        }
        start = clipped_sum(start, warp_shfl(sum, kWarpSize - 1));
      }
    }
  }

  // First row after those of a local expert of this rank.
  JAX_EP_DEVICE u32 end_of(i32 local) const {
    const i32 expert = rank_ * num_local_ + local;
    if (local + 1 < num_local_) return memory_.start[expert + 1];
    const u64 alignment = static_cast<u64>(shape_.expert_alignment);
    const u64 total = ld(totals() + expert);
    return clip(u64{memory_.start[expert]} + (total + alignment - 1) / alignment * alignment);
  }

  JAX_EP_DEVICE void assign(i32 item) {
    const TokenTile tile = tile_of(item);
    const bool own = tile.source == rank_;
    load_cursors(item, own);
    warp_sync();
    const auto bin_of = [this, own](i32 expert) {
      return own || is_local_expert(expert) ? row_bin(expert) : -1;
    };
    for_each_run(tile, [this, &tile, own, &bin_of](i32 first, i32 expert) {
      const CountedSelection counted = take(expert, bin_of);
      u32 row = capacity_;
      if (counted.bin >= 0) {
        const u32 before = count_bits(counted.lanes & lanes_below(first_lane_));
        row = clip(u64{memory_.cursor[warp_id()][counted.bin]} + before);
      }
      warp_sync();  // all rows are read before a cursor moves
      advance(counted);
      const i32 token = first + lane_token_;
      if (own && has_token(tile, first)) {
        st(Ptr<i32>{params_.op.slot} + (i64{first} * num_topk_ + lane_id()), slot_of(row));
      }
      const bool is_local = counted.bin >= 0 && is_local_expert(expert);
      const i64 global_token = has_token(tile, first) ? i64{tile.source} * num_tokens_ + token : -1;
      is_rank_major() ? write_rank_row(global_token, is_local, row, expert)
                      : write_expert_rows(global_token, is_local, row);
    });
  }

  // Where the rows of a tile begin in each bin in which its selections take part.
  JAX_EP_DEVICE void load_cursors(i32 item, bool own) {
    constexpr i32 kAtOnce = 8;  // loads in flight
    const i32 all = is_rank_major() ? num_ranks_ : shape_.num_experts;
    const i32 bins_of_rank = is_rank_major() ? 1 : num_local_;
    const i32 first_bin = (is_rank_major() ? rank_bin(0) : 0) + (own ? 0 : rank_ * bins_of_rank);
    const i32 last_bin = first_bin + (own ? all : bins_of_rank);
    const auto bin_of = [first_bin](i32 base, i32 i) {
      return first_bin + base + i * static_cast<i32>(kWarpSize) + static_cast<i32>(lane_id());
    };
    for (i32 base = 0; first_bin + base < last_bin; base += kAtOnce * static_cast<i32>(kWarpSize)) {
      u32 before[kAtOnce];
      JAX_EP_UNROLL
      for (i32 i = 0; i < kAtOnce; ++i) {
        before[i] = bin_of(base, i) < last_bin ? ld(count_of(bin_of(base, i), item)) : 0;
      }
      JAX_EP_UNROLL
      for (i32 i = 0; i < kAtOnce; ++i) {
        const i32 bin = bin_of(base, i);
        if (bin >= last_bin) continue;
        const u32 start = is_rank_major() ? 0 : static_cast<u32>(memory_.start[bin]);
        memory_.cursor[warp_id()][bin] = start + before[i];
      }
    }
  }

  JAX_EP_DEVICE bool is_local_expert(i32 expert) const {
    return owner_of(expert, num_local_) == rank_;
  }
  JAX_EP_DEVICE i32 slot_of(u32 row) const { return row < capacity_ ? static_cast<i32>(row) : -1; }

  // All lanes. `global_token` is the number of the lane's token among those of all ranks, -1 if it
  // has none. The rows of this rank that hold a token, in ascending order, which is that of the
  // experts.
  JAX_EP_DEVICE void write_expert_rows(i64 global_token, bool is_local, u32 row) {
    const i32 max_rows = max_rows_per_token(shape_.layout, num_topk_, num_local_);
    const bool has_row = is_local && row < capacity_;
    const u32 lanes_with_row = warp_ballot(has_row) & token_lanes_;
    u32 position = 0;
    for (i32 k = 0; k < num_topk_; ++k) {
      const u32 lane = (first_lane_ + static_cast<u32>(k)) % kWarpSize;
      position += static_cast<u32>(warp_shfl(row, lane) < row && (lanes_with_row >> lane & 1) != 0);
    }
    if (global_token < 0) return;
    const Ptr<i32> rows = Ptr<i32>{params_.op.source_slot} + global_token * max_rows;
    const auto k = static_cast<i32>(lane_id() - first_lane_);
    if (has_row) {
      st(rows + position, static_cast<i32>(row));
      st(Ptr<i32>{params_.op.row_source} + row, static_cast<i32>(global_token));
    }
    if (k >= static_cast<i32>(count_bits(lanes_with_row)) && k < max_rows) st(rows + k, -1);
  }

  JAX_EP_DEVICE void write_rank_row(i64 global_token, bool is_local, u32 row, i32 expert) {
    const u32 holders = warp_ballot(is_local && row < capacity_) & token_lanes_;
    const u32 row_of_token = warp_shfl(row, holders != 0 ? lowest_bit(holders) : lane_id());
    if (global_token < 0) return;
    const bool is_first = lane_id() == first_lane_;
    if (is_first) {
      st(Ptr<i32>{params_.op.source_slot} + global_token,
         holders != 0 ? static_cast<i32>(row_of_token) : -1);
    }
    if (holders == 0) return;
    if (is_first)
      st(Ptr<i32>{params_.op.row_source} + row_of_token, static_cast<i32>(global_token));
    st(Ptr<i32>{params_.op.row_topk_idx} +
           (i64{row_of_token} * num_topk_ + (lane_id() - first_lane_)),
       is_local ? expert - rank_ * num_local_ : -1);
  }

  // --- what the rank reports -----------------------------------------------------------------

  JAX_EP_DEVICE void write_counts() {
    if (warp_ != 0) return;
    u32 dropped = 0;
    for (i32 local = static_cast<i32>(lane_id()); local < num_local_; local += kWarpSize) {
      const u32 total = ld(totals() + (rank_ * num_local_ + local));
      st(Ptr<i32>{params_.op.tokens_per_expert} + local, static_cast<i32>(total));
      if (is_rank_major()) continue;
      const u32 start = memory_.start[rank_ * num_local_ + local];
      st(Ptr<i32>{params_.op.group_sizes} + local, static_cast<i32>(end_of(local) - start));
      dropped += total - (clip(u64{start} + total) - start);
    }
    for (i32 source = static_cast<i32>(lane_id()); source < num_ranks_ && is_rank_major();
         source += kWarpSize) {
      const u32 begin = rows_before(source);
      const u32 end = rows_before(source + 1);
      st(Ptr<i32>{params_.op.group_sizes} + source, static_cast<i32>(clip(end) - clip(begin)));
      dropped += (end - clip(end)) - (begin - clip(begin));
    }
    dropped = warp_shfl(inclusive_sum(dropped), kWarpSize - 1);
    constexpr u32 kInt32Max = 0x7FFF'FFFF;
    if (lane_id() != 0) return;
    st(Ptr<i32>{params_.op.num_dropped},
       static_cast<i32>(dropped < kInt32Max ? dropped : kInt32Max));
  }

  // Layout "rank": rows of this rank that hold tokens of earlier sources.
  JAX_EP_DEVICE u32 rows_before(i32 source) const {
    if (num_tiles_ == 0) return 0;
    if (source == num_ranks_) return ld(totals() + rank_bin(rank_));
    return ld(count_of(rank_bin(rank_), source * num_tiles_));
  }

  JAX_EP_DEVICE void clear_rows_without_token() {
    for (i32 local = warp_; local < num_local_ && !is_rank_major(); local += num_warps_) {
      const u64 start = memory_.start[rank_ * num_local_ + local];
      const u32 occupied = clip(start + ld(totals() + (rank_ * num_local_ + local)));
      clear(occupied, end_of(local), lane_id(), kWarpSize);
    }
    const u32 end = is_rank_major() ? clip(rows_before(num_ranks_)) : end_of(num_local_ - 1);
    clear(end, capacity_, block_id() * num_threads() + thread_id(), num_blocks() * num_threads());
  }

  JAX_EP_DEVICE void clear(u32 begin, u32 end, u32 worker, u32 num_workers) {
    for (i64 row = i64{begin} + worker; row < end; row += num_workers) {
      st(Ptr<i32>{params_.op.row_source} + row, -1);
      for (i32 k = 0; k < num_topk_ && is_rank_major(); ++k) {
        st(Ptr<i32>{params_.op.row_topk_idx} + (row * num_topk_ + k), -1);
      }
    }
  }

  // --- when the group has been closed ----------------------------------------------------------

  // Without a row or a selection: what comes after must not lead anywhere.
  JAX_EP_DEVICE void leave_no_results() {
    const i64 selections = i64{num_tokens_} * num_topk_;
    const i32 max_rows = max_rows_per_token(shape_.layout, num_topk_, num_local_);
    exchange_.poison(params_.op.slot, selections);
    exchange_.poison(params_.op.row_source, capacity_);
    if (is_rank_major()) exchange_.poison(params_.op.row_topk_idx, i64{capacity_} * num_topk_);
    exchange_.poison(params_.op.source_slot, i64{num_ranks_} * num_tokens_ * max_rows);
    exchange_.fill(Ptr<i32>{params_.op.group_sizes}, shape_.num_row_groups(), 0);
    exchange_.fill(Ptr<i32>{params_.op.tokens_per_expert}, num_local_, 0);
    exchange_.fill(Ptr<i32>{params_.op.num_dropped}, 1, 0);
    exchange_.report_closed();
  }

  const PlanParams& params_;
  const EpShape& shape_;
  const Exchange exchange_;
  typename Config::SharedStorage& memory_;
  const i32 rank_;
  const i32 num_ranks_;
  const i32 num_topk_;
  const i32 num_tokens_;
  const i32 num_local_;
  const i32 num_bins_;
  const u32 bin_bits_;  // of a bin's number plus 1
  const i32 tile_tokens_;
  const i32 num_tiles_;
  const i32 num_items_;  // tiles of all sources
  const u32 capacity_;
  const i32 warp_;  // among all blocks
  const i32 num_warps_;
  const i32 run_tokens_;
  const i32 lane_token_;   // this lane's, in a run; there may be none
  const u32 first_lane_;   // of that token
  const u32 token_lanes_;  // as bits
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_KERNEL_H_
