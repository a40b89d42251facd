// SPDX-License-Identifier: Apache-2.0
// Plan: every rank gathers the routing of all ranks, counts it tile by tile, and turns the counts
// into rows by prefix sums. Each rank works out both sides: the slots of its own selections, and
// what its own rows hold. One exchange, and no order depends on an atomic.
//
// Steps, with a grid barrier between 2, 3 and 4:
//   1. send      each chunk of topk_idx goes to all ranks
//   2. count     selections per (source rank, tile, bin), as the chunks arrive
//   3. scan      per bin: counts become the number of earlier selections of the bin
//   4. assign    every tile walks its tokens, 32 at a time, and hands out rows in their order
// Bins are the experts; in layout "rank" the destination ranks follow, which count tokens.
#ifndef JAX_EP_CSRC_KERNELS_PLAN_KERNEL_H_
#define JAX_EP_CSRC_KERNELS_PLAN_KERNEL_H_

#include "csrc/device/exchange.h"
#include "csrc/device/selections.h"
#include "csrc/device/warp_scan.h"

namespace jax_ep::dev {

template <int kWarpCount, int kBinCount>
struct PlanTile {
  static constexpr int kWarps = kWarpCount;
  static constexpr int kStages = 0;
  static constexpr int kMaxBins = kBinCount;

  struct SharedStorage {
    // Per warp and bin: which of the 32 tokens in hand select it; all 0 between uses.
    Shared<u32> selecting[kWarps][kMaxBins];
    // Per warp and bin: the selections counted so far, or the next row.
    Shared<u32> cursor[kWarps][kMaxBins];
    // First row of every expert at its rank, clipped to the capacity.
    Shared<u32> start[kMaxBins];
  };
};

template <typename Tile>
class PlanKernel {
 public:
  JAX_EP_DEVICE explicit PlanKernel(const PlanParams& params)
      : params_(params),
        shape_(params.shape),
        exchange_(params.view, OpKind::kPlan, params.group_rank),
        memory_(shared<typename Tile::SharedStorage>()),
        rank_(params.view.rank),
        num_ranks_(params.view.num_ranks),
        num_topk_(shape_.num_topk),
        num_tokens_(static_cast<i32>(shape_.num_tokens)),
        num_local_(shape_.num_local_experts()),
        num_bins_(num_bins(shape_.layout, shape_.num_experts, num_ranks_)),
        tile_tokens_(tile_tokens(shape_.num_tokens, num_ranks_)),
        num_tiles_(num_tiles(shape_.num_tokens, num_ranks_)),
        capacity_(static_cast<u32>(shape_.recv_capacity)),
        warp_(static_cast<i32>(block_id() * Tile::kWarps + warp_id())),
        num_warps_(static_cast<i32>(num_blocks() * Tile::kWarps)) {}

  JAX_EP_DEVICE void run() {
    send();
    clear_tables();
    for (i32 unit = warp_; unit < num_ranks_ * num_tiles_; unit += num_warps_) count(unit);
    exchange_.grid_barrier();
    for (i32 bin = warp_; bin < num_bins_; bin += num_warps_) scan(bin);
    exchange_.grid_barrier();
    start_experts();
    block_sync();
    for (i32 unit = warp_; unit < num_ranks_ * num_tiles_; unit += num_warps_) assign(unit);
    write_counts();
    clear_rows_without_token();
    exchange_.finish();
  }

 private:
  JAX_EP_DEVICE bool by_rank() const { return shape_.layout == Layout::kRank; }
  JAX_EP_DEVICE i32 rank_bin(i32 rank) const { return shape_.num_experts + rank; }
  JAX_EP_DEVICE bool is_expert(i32 expert) const {
    return expert >= 0 && expert < shape_.num_experts;
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
      const auto from = Ptr<const i32>{params_.topk_idx} + first * num_topk_;
      for (i64 i = lane_id(); i < elements; i += kWarpSize) {
        const i32 expert = ld(from + i);
        for (i32 peer = 0; peer < num_ranks_; ++peer) {
          st(staged_routing(exchange_.view(), peer, rank_, first, num_topk_) + i, expert);
        }
      }
      exchange_.signal_arrived(chunk);
    }
  }

  // --- 2. count ------------------------------------------------------------------------------

  // `count` begins with a warp_sync, as does the first use of the cursors in `assign`.
  JAX_EP_DEVICE void clear_tables() {
    for (i32 bin = static_cast<i32>(lane_id()); bin < num_bins_; bin += kWarpSize) {
      memory_.selecting[warp_id()][bin] = 0;
      memory_.cursor[warp_id()][bin] = 0;
    }
  }

  struct Unit {
    i32 source;
    i32 first;  // token
    i32 last;
  };
  JAX_EP_DEVICE Unit tile_of(i32 unit) const {
    const i32 first = unit % num_tiles_ * tile_tokens_;
    const i32 last = first + tile_tokens_;
    return {unit / num_tiles_, first, last < num_tokens_ ? last : num_tokens_};
  }
  JAX_EP_DEVICE Ptr<u32> counts(i32 unit) const {
    return region<u32>(exchange_.view(), rank_, Region::kCounts) + i64{unit} * num_bins_;
  }
  JAX_EP_DEVICE Ptr<u32> totals() const {
    return region<u32>(exchange_.view(), rank_, Region::kTotals);
  }

  JAX_EP_DEVICE Ptr<i32> routing(i32 source, i32 token) const {
    return staged_routing(exchange_.view(), rank_, source, token, num_topk_);
  }

  // The bin whose count gives a selection its row.
  JAX_EP_DEVICE i32 row_bin(i32 expert) const {
    return by_rank() ? rank_bin(expert / num_local_) : expert;
  }

  // Marks this lane's token in the bins of its selections; `bin_of(expert)` is negative for those
  // that take no part. Bit k of the result: this lane looks after the bin of selection k, because
  // it came first. A selection that repeats another counts once.
  template <typename BinOf>
  JAX_EP_DEVICE u32 mark(i32 source, i32 token, bool has_token, const BinOf& bin_of) {
    constexpr i32 kAtOnce = 8;  // loads in flight
    u32 looks_after = 0;
    for (i32 first = 0; first < num_topk_ && has_token; first += kAtOnce) {
      i32 expert[kAtOnce];
      JAX_EP_UNROLL
      for (i32 i = 0; i < kAtOnce; ++i) {
        expert[i] = first + i < num_topk_ ? ld(routing(source, token) + (first + i)) : -1;
      }
      JAX_EP_UNROLL
      for (i32 i = 0; i < kAtOnce; ++i) {
        const i32 bin = is_expert(expert[i]) ? bin_of(expert[i]) : -1;
        if (bin < 0) continue;
        const u32 before =
            shared_or(address_of(memory_.selecting[warp_id()][bin]), 1U << lane_id());
        looks_after |= static_cast<u32>(before == 0) << (first + i);
      }
    }
    warp_sync();
    return looks_after;
  }

  // Moves the cursors past the tokens in hand, and forgets them.
  template <typename BinOf>
  JAX_EP_DEVICE void advance(i32 source, i32 token, u32 looks_after, const BinOf& bin_of) {
    for (; looks_after != 0; looks_after &= looks_after - 1) {
      const i32 bin = bin_of(ld(routing(source, token) + lowest_bit(looks_after)));
      auto& selecting = memory_.selecting[warp_id()][bin];
      auto& cursor = memory_.cursor[warp_id()][bin];
      cursor = cursor + count_bits(selecting);
      selecting = 0;
    }
    warp_sync();
  }

  JAX_EP_DEVICE void count(i32 unit) {
    const Unit tile = tile_of(unit);
    const i32 tokens = chunk_tokens(num_tokens_, params_.view.chunk_target);
    const i32 last_chunk = (tile.last - 1) / tokens;
    for (i32 chunk = tile.first / tokens + static_cast<i32>(lane_id()); chunk <= last_chunk;
         chunk += kWarpSize) {
      exchange_.wait_arrived(tile.source, chunk);
    }
    warp_sync();
    const auto by_row_bin = [this](i32 expert) { return row_bin(expert); };
    const auto by_expert = [](i32 expert) { return expert; };
    for (i32 first = tile.first; first < tile.last; first += kWarpSize) {
      const i32 token = first + static_cast<i32>(lane_id());
      const bool has_token = token < tile.last;
      advance(tile.source, token, mark(tile.source, token, has_token, by_row_bin), by_row_bin);
      // Layout "rank" hands out rows by rank, but reports selections by expert.
      if (!by_rank()) continue;
      advance(tile.source, token, mark(tile.source, token, has_token, by_expert), by_expert);
    }
    for (i32 bin = static_cast<i32>(lane_id()); bin < num_bins_; bin += kWarpSize) {
      auto& cursor = memory_.cursor[warp_id()][bin];
      st(counts(unit) + bin, cursor);
      cursor = 0;
    }
  }

  // --- 3. scan -------------------------------------------------------------------------------

  JAX_EP_DEVICE void scan(i32 bin) {
    constexpr i32 kAtOnce = 4;  // loads in flight
    const i32 units = num_ranks_ * num_tiles_;
    u32 total = 0;
    for (i32 first = 0; first < units; first += kAtOnce * static_cast<i32>(kWarpSize)) {
      u32 here[kAtOnce];
      JAX_EP_UNROLL
      for (i32 i = 0; i < kAtOnce; ++i) {
        const i32 unit = unit_of_lane(first, i);
        here[i] = unit < units ? ld(counts(unit) + bin) : 0;
      }
      JAX_EP_UNROLL
      for (i32 i = 0; i < kAtOnce; ++i) {
        const i32 unit = unit_of_lane(first, i);
        const u32 sum = inclusive_sum(here[i]);
        if (unit < units) st(counts(unit) + bin, total + sum - here[i]);
        total += warp_shfl(sum, kWarpSize - 1);
      }
    }
    if (lane_id() == 0) st(totals() + bin, total);
  }
  JAX_EP_DEVICE static i32 unit_of_lane(i32 first, i32 step) {
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
    for (i32 rank = static_cast<i32>(warp_id()); rank < num_ranks_ && !by_rank();
         rank += Tile::kWarps) {
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

  JAX_EP_DEVICE void assign(i32 unit) {
    const Unit tile = tile_of(unit);
    const bool own = tile.source == rank_;
    const auto bin_of = [this, own](i32 expert) {
      return own || expert / num_local_ == rank_ ? row_bin(expert) : -1;
    };
    const i32 first_bin = by_rank() ? rank_bin(own ? 0 : rank_) : own ? 0 : rank_ * num_local_;
    const i32 my_bins = by_rank() ? (own ? num_ranks_ : 1) : own ? num_bins_ : num_local_;
    for (i32 i = static_cast<i32>(lane_id()); i < my_bins; i += kWarpSize) {
      const i32 bin = first_bin + i;
      const u32 start = by_rank() ? 0 : static_cast<u32>(memory_.start[bin]);
      memory_.cursor[warp_id()][bin] = start + ld(counts(unit) + bin);
    }
    for (i32 first = tile.first; first < tile.last; first += kWarpSize) {
      const i32 token = first + static_cast<i32>(lane_id());
      const bool has_token = token < tile.last;
      const u32 looks_after = mark(tile.source, token, has_token, bin_of);
      if (has_token) {
        const u32 selected = selections_of(tile.source, token, bin_of);
        if (own) write_slots(token, selected);
        by_rank() ? hold_by_rank(tile.source, token, selected)
                  : hold_by_expert(tile.source, token, selected);
      }
      warp_sync();
      advance(tile.source, token, looks_after, bin_of);
    }
  }

  // The row of this lane's token in a bin; it may lie past the capacity.
  JAX_EP_DEVICE u32 row_in(i32 bin) const {
    const u32 tokens = memory_.selecting[warp_id()][bin];
    return memory_.cursor[warp_id()][bin] + count_bits(tokens & lanes_below(lane_id()));
  }

  // The selections, as bits, that take part: they name an expert, and none before them the same.
  template <typename BinOf>
  JAX_EP_DEVICE u32 selections_of(i32 source, i32 token, const BinOf& bin_of) const {
    const Ptr<i32> experts = routing(source, token);
    u32 selected = 0;
    for (i32 k = 0; k < num_topk_; ++k) {
      const i32 expert = ld(experts + k);
      if (!is_expert(expert) || bin_of(expert) < 0) continue;
      bool repeats = false;
      for (u32 before = selected; before != 0; before &= before - 1) {
        repeats |= ld(experts + lowest_bit(before)) == expert;
      }
      selected |= static_cast<u32>(!repeats) << k;
    }
    return selected;
  }

  JAX_EP_DEVICE void write_slots(i32 token, u32 selected) {
    for (i32 k = 0; k < num_topk_; ++k) {
      const bool is_selected = (selected >> k & 1) != 0;
      const u32 row = is_selected ? row_in(row_bin(ld(routing(rank_, token) + k))) : capacity_;
      st(Ptr<i32>{params_.slot} + (i64{token} * num_topk_ + k),
         row < capacity_ ? static_cast<i32>(row) : -1);
    }
  }

  // Those of a token's selections whose expert is one of this rank's.
  JAX_EP_DEVICE u32 selections_here(i32 source, i32 token, u32 selected) const {
    u32 here = 0;
    for (u32 left = selected; left != 0; left &= left - 1) {
      const i32 expert = ld(routing(source, token) + lowest_bit(left));
      here |= static_cast<u32>(expert / num_local_ == rank_) << lowest_bit(left);
    }
    return here;
  }

  // The rows of this rank that hold a token, in ascending order, which is that of the experts.
  JAX_EP_DEVICE void hold_by_expert(i32 source, i32 token, u32 selected) {
    const i32 most = max_rows_per_token(shape_.layout, num_topk_, num_local_);
    const i64 number = i64{source} * num_tokens_ + token;
    const Ptr<i32> experts = routing(source, token);
    const Ptr<i32> held = Ptr<i32>{params_.source_slot} + number * most;
    const u32 here = selections_here(source, token, selected);
    i32 num_held = 0;
    for (u32 left = here; left != 0; left &= left - 1) {
      const i32 expert = ld(experts + lowest_bit(left));
      const u32 row = row_in(expert);
      if (row >= capacity_) continue;
      i32 place = 0;
      for (u32 others = here; others != 0; others &= others - 1) {
        place += static_cast<i32>(ld(experts + lowest_bit(others)) < expert);
      }
      st(held + place, static_cast<i32>(row));
      st(Ptr<i32>{params_.row_source} + row, static_cast<i32>(number));
      ++num_held;
    }
    for (i32 place = num_held; place < most; ++place) st(held + place, -1);
  }

  JAX_EP_DEVICE void hold_by_rank(i32 source, i32 token, u32 selected) {
    const i64 number = i64{source} * num_tokens_ + token;
    const u32 here = selections_here(source, token, selected);
    const u32 row = here != 0 ? row_in(rank_bin(rank_)) : capacity_;
    const bool is_held = row < capacity_;
    st(Ptr<i32>{params_.source_slot} + number, is_held ? static_cast<i32>(row) : -1);
    if (!is_held) return;
    st(Ptr<i32>{params_.row_source} + row, static_cast<i32>(number));
    for (i32 k = 0; k < num_topk_; ++k) {
      const bool is_here = (here >> k & 1) != 0;
      st(Ptr<i32>{params_.row_topk_idx} + (i64{row} * num_topk_ + k),
         is_here ? ld(routing(source, token) + k) - rank_ * num_local_ : -1);
    }
  }

  // --- what the rank reports -----------------------------------------------------------------

  JAX_EP_DEVICE void write_counts() {
    if (warp_ != 0) return;
    u32 dropped = 0;
    for (i32 local = static_cast<i32>(lane_id()); local < num_local_; local += kWarpSize) {
      const u32 total = ld(totals() + (rank_ * num_local_ + local));
      st(Ptr<i32>{params_.tokens_per_expert} + local, static_cast<i32>(total));
      if (by_rank()) continue;
      const u32 start = memory_.start[rank_ * num_local_ + local];
      st(Ptr<i32>{params_.group_sizes} + local, static_cast<i32>(end_of(local) - start));
      dropped += total - (clip(u64{start} + total) - start);
    }
    for (i32 source = static_cast<i32>(lane_id()); source < num_ranks_ && by_rank();
         source += kWarpSize) {
      const u32 begin = rows_before(source);
      const u32 end = rows_before(source + 1);
      st(Ptr<i32>{params_.group_sizes} + source, static_cast<i32>(clip(end) - clip(begin)));
      dropped += (end - clip(end)) - (begin - clip(begin));
    }
    dropped = warp_shfl(inclusive_sum(dropped), kWarpSize - 1);
    constexpr u32 kInt32Max = 0x7FFF'FFFF;
    if (lane_id() != 0) return;
    st(Ptr<i32>{params_.num_dropped}, static_cast<i32>(dropped < kInt32Max ? dropped : kInt32Max));
  }

  // Layout "rank": rows of this rank that hold tokens of earlier sources.
  JAX_EP_DEVICE u32 rows_before(i32 source) const {
    if (num_tiles_ == 0) return 0;
    if (source == num_ranks_) return ld(totals() + rank_bin(rank_));
    return ld(counts(source * num_tiles_) + rank_bin(rank_));
  }

  JAX_EP_DEVICE void clear_rows_without_token() {
    for (i32 local = warp_; local < num_local_ && !by_rank(); local += num_warps_) {
      const u64 start = memory_.start[rank_ * num_local_ + local];
      const u32 occupied = clip(start + ld(totals() + (rank_ * num_local_ + local)));
      clear(occupied, end_of(local), lane_id(), kWarpSize);
    }
    const u32 end = by_rank() ? clip(rows_before(num_ranks_)) : end_of(num_local_ - 1);
    clear(end, capacity_, block_id() * num_threads() + thread_id(), num_blocks() * num_threads());
  }

  JAX_EP_DEVICE void clear(u32 begin, u32 end, u32 worker, u32 num_workers) {
    for (i64 row = i64{begin} + worker; row < end; row += num_workers) {
      st(Ptr<i32>{params_.row_source} + row, -1);
      for (i32 k = 0; k < num_topk_ && by_rank(); ++k) {
        st(Ptr<i32>{params_.row_topk_idx} + (row * num_topk_ + k), -1);
      }
    }
  }

  const PlanParams& params_;
  const EpShape& shape_;
  const Exchange exchange_;
  typename Tile::SharedStorage& memory_;
  const i32 rank_;
  const i32 num_ranks_;
  const i32 num_topk_;
  const i32 num_tokens_;
  const i32 num_local_;
  const i32 num_bins_;
  const i32 tile_tokens_;
  const i32 num_tiles_;
  const u32 capacity_;
  const i32 warp_;  // among all blocks
  const i32 num_warps_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_PLAN_KERNEL_H_
