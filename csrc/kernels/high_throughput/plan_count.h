// SPDX-License-Identifier: Apache-2.0
// The first steps of a plan: every rank gathers the routing of all ranks, counts it tile by tile,
// and sums the counts up.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_COUNT_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_COUNT_H_

#include "csrc/kernels/high_throughput/plan_context.h"

namespace jax_ep::dev {

template <typename RowLayout>
class PlanCounter {
  using Context = typename RowLayout::Context;

 public:
  JAX_EP_DEVICE explicit PlanCounter(Context& context) : c_(context), layout_(context) {}

  // 1. Each chunk of topk_idx goes to all ranks.
  JAX_EP_DEVICE void send() {
    if (c_.warp >= c_.chunks.count) return;
    c_.exchange.wait_until_writable();
    for (i32 chunk = c_.warp; chunk < c_.chunks.count; chunk += c_.num_warps) {
      const i64 first = c_.chunks.first_token(chunk);
      const i64 elements = (c_.chunks.last_token(chunk) - first) * c_.num_topk;
      const auto from = Ptr<const i32>{c_.op.topk_idx} + first * c_.num_topk;
      for (i64 i = lane_id(); i < elements; i += kWarpSize) {
        const i32 expert = ld(from + i);
        for_each_peer(c_.exchange.view(), [this, first, i, expert](i32 peer) {
          put_expert(c_.exchange.view(), peer, first, c_.num_topk, i, expert);
        });
      }
      c_.exchange.signal_arrived(chunk);
    }
  }

  // 2. Selections per (source rank, tile, bin), as the chunks arrive.
  JAX_EP_DEVICE void count() {
    c_.clear_cursors();
    for (i32 item = c_.warp; item < c_.num_items; item += c_.num_warps) count(item);
  }

  // 3. Per bin: counts become the number of earlier selections of the bin.
  JAX_EP_DEVICE void scan() {
    for (i32 bin = c_.warp; bin < c_.bins; bin += c_.num_warps) {
      const u32 total =
          scan_counts(c_.num_items, [this, bin](i32 item) { return c_.count_of(bin, item); });
      if (lane_id() == 0) st(c_.totals() + bin, total);
    }
  }

 private:
  JAX_EP_DEVICE void count(i32 item) {
    const typename Context::TokenTile tile = c_.tile_of(item);
    const i32 last_chunk = c_.chunks.chunk_of(tile.last - 1);
    for (i32 chunk = c_.chunks.chunk_of(tile.first) + static_cast<i32>(lane_id());
         chunk <= last_chunk && tile.active;
         chunk += kWarpSize) {
      c_.exchange.wait_arrived(tile.source, chunk);
    }
    warp_sync();
    c_.for_each_run(tile, [this](i32, i32 expert) { layout_.count(c_.selection_of(expert)); });
    c_.take_cursors([this, item](i32 bin) { return c_.count_of(bin, item); });
  }

  Context& c_;
  const RowLayout layout_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_PLAN_COUNT_H_
