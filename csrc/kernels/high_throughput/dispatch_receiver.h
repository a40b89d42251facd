// SPDX-License-Identifier: Apache-2.0
// The receivers of a dispatch: they expand what arrives to the rows of the receive buffer.
//
// They read this rank's staging, source_slot and row_source, from x the rows that stay, and
// row_weights and y; they write rows, rows_scales, row_scalars and row_dots. They wait for arrived.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_RECEIVER_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_RECEIVER_H_

#include "csrc/kernels/high_throughput/dispatch_context.h"
#include "csrc/kernels/high_throughput/dispatch_products.h"

namespace jax_ep::dev {

// `RowLayout` is DispatchExpertLayout or DispatchRankLayout.
template <typename RowLayout>
class DispatchReceiver {
  using Context = typename RowLayout::Context;

 public:
  JAX_EP_DEVICE explicit DispatchReceiver(Context& context)
      : c_(context), calls_tail_(c_.exchange.has_tail() && !c_.exchange.in_tail()) {}

  JAX_EP_DEVICE void receive() {
    const bool has_tail = c_.exchange.has_tail();
    // While the first chunks are on their way; or last, when the tail helps.
    if (!has_tail) clear_rows_without_token();
    const i32 num_tokens = num_token_items();
    const i32 num_items = num_tokens + (has_tail ? num_clear_runs() : 0);
    for (WorkQueue work = c_.exchange.receiving(num_items, c_.num_senders); work.has_item();
         work.next()) {
      if (work.item() < num_tokens) {
        receive_token(work.item());
      } else {
        clear_rows_without_token(work.item() - num_tokens);
      }
    }
  }

  // All warps of a launch without a tail, before they receive.
  JAX_EP_DEVICE void clear_rows_without_token() const {
    const auto warp = static_cast<i32>(warp_id() * num_blocks() + block_id());
    const auto num_warps = static_cast<i32>(num_blocks() * Config::kWarps);
    for (i32 run = warp; run < num_clear_runs(); run += num_warps) clear_rows_without_token(run);
  }

  // What peers send, token by token: in the order in which chunks arrive; each rank begins with
  // itself. A warp takes one token of a chunk, not all, so that all warps end at about the same
  // time.
  JAX_EP_DEVICE i32 num_token_items() const {
    return c_.parts.count() * num_sources() * c_.parts.chunks.tokens_per_chunk;
  }
  JAX_EP_DEVICE void receive_token(i32 item) {
    const i32 tokens_per_chunk = c_.parts.chunks.tokens_per_chunk;
    const i32 flag_of_source = item / tokens_per_chunk;
    const i32 flag_idx = flag_of_source / num_sources();
    const i32 source = peer_at_turn(c_.exchange.view(), flag_of_source % num_sources());
    const ChunkPart part = c_.parts.at(flag_idx);
    const i64 token = part.first_token + item % tokens_per_chunk;
    if (source < 0 || token >= part.last_token) return;
    if (lane_id() == 0) c_.exchange.wait_arrived(source, flag_idx);
    warp_sync();
    // The copy engine, too, sees what has arrived.
    fence_proxy_async_global();
    const i32 row = held_row(source, token);
    call_tail_if_all_sent();
    if (part.has_scalars) {
      const Ptr<float> scalars =
          staged_scalars(c_.exchange.view(), c_.rank, source, token, c_.num_topk);
      expand_scalars(row, {scalars.raw});
    }
    expand(
        token,
        token + 1,
        part.first_segment,
        part.last_segment,
        [row](i64 /*token*/) { return row; },
        [this, source](i64 of_token) { return arrived_row(source, of_token); });
  }

  // Lane j gets the j-th row of this rank that holds a token of a source, or -1.
  JAX_EP_DEVICE i32 held_row(i32 source, i64 token) const {
    return row_of_lane(
        c_.shape, RowLayout::kLayout, Ptr<const i32>{c_.op.source_slot}, source, token);
  }

  // Expands segments [first_segment, last_segment) of the rows of tokens [first, last), which lie
  // at `from(token)` as they travel, to the rows `row_of(token)` of each lane; all segments, where
  // rows go element by element. `row_of` is called once for each token, in order.
  template <typename RowOf, typename From>
  JAX_EP_DEVICE void expand(i64 first,
                            i64 last,
                            i32 first_segment,
                            i32 last_segment,
                            const RowOf& row_of,
                            const From& from) {
    // One of the two is compiled, for it is long.
    if constexpr (!Config::kProducts) {
      if (c_.hidden > 0 && c_.bulk) {
        expand_segments(first, last, first_segment, last_segment, row_of, from);
        return;
      }
    }
    for (i64 token = first; token < last; ++token) {
      const i32 row = row_of(token);
      if (c_.hidden == 0 && !c_.with_dots()) continue;
      if constexpr (Config::kProducts) {
        if (c_.hidden > 0 && c_.bulk) {
          products_.prefetch(row);
          const auto same_row = [row](i64 /*token*/) { return row; };
          expand_segments(token, token + 1, first_segment, last_segment, same_row, from);
          continue;
        }
      }
      expand_elements(from(token), row);
    }
  }

  // The scalars of a row, of which one or K have arrived.
  JAX_EP_DEVICE void expand_scalars(i32 row, Ptr<const float> arrived) {
    if (c_.op.num_scalars > 0) layout().expand_scalars(row, arrived);
  }

 private:
  using Config = typename RowLayout::Config;
  using RowType = typename RowLayout::RowType;
  using Element = typename RowType::Element;

  JAX_EP_DEVICE RowLayout layout() const { return RowLayout(c_); }
  JAX_EP_DEVICE i32 num_sources() const { return c_.exchange.view().num_neighbors; }

  // Lets the blocks of the tail begin, once they need not wait for a peer. They do when a warp of
  // each main block has been here.
  JAX_EP_DEVICE void call_tail_if_all_sent() {
    if (!calls_tail_ || !c_.exchange.all_sent()) return;
    calls_tail_ = false;
    launch_dependents();
  }

  JAX_EP_DEVICE Ptr<const std::byte> arrived_row(i32 source, i64 token) const {
    if (source == c_.unstaged_rank) return c_.x_row(token);
    const Ptr<std::byte> row = staged_row(c_.exchange.view(), c_.rank, source, token);
    return {row.raw};
  }

  template <typename RowOf, typename From>
  JAX_EP_DEVICE void expand_segments(i64 first,
                                     i64 last,
                                     i32 first_segment,
                                     i32 last_segment,
                                     const RowOf& row_of,
                                     const From& from) {
    const auto source_of = [this, &from](i64 token, i32 segment) {
      return SegmentSource{from(token) + c_.staged_at(c_.segments.first(segment)),
                           c_.staged_bytes(c_.segments.size(segment, c_.hidden))};
    };
    stream_segments(c_.ring,
                    first,
                    last,
                    first_segment,
                    last_segment,
                    row_of,
                    source_of,
                    [this](i64 /*token*/, i32 row, i32 segment, Ptr<u32> stage) {
                      if constexpr (Config::kProducts) products_.take_segment(row, segment, stage);
                      expand_segment(row, segment, stage);
                    });
  }

  JAX_EP_DEVICE void expand_segment(i32 row, i32 segment, Ptr<u32> stage) {
    const i32 num_elements = c_.segments.size(segment, c_.hidden);
    const i64 first = c_.segments.first(segment);
    if (c_.restores()) {
      restore_segment<RowType>(stage, num_elements);
    } else if (c_.fp8_wire()) {
      expand_scales(scales_in(stage, num_elements),
                    first / kScaleBlock,
                    ceil_div(num_elements, kScaleBlock),
                    row);
    }
    if (row < 0 || c_.weighted()) return;
    bulk_store(c_.out_row(row) + first * c_.rows_bytes,
               stage,
               static_cast<u32>(num_elements * c_.rows_bytes));
  }

  // Copies the scales of some blocks of a row to every row that holds the token.
  JAX_EP_DEVICE void expand_scales(Ptr<float> scales, i64 first_block, i64 blocks, i32 row) {
    u32 holders = warp_ballot(row >= 0);
    for (; holders != 0; holders &= holders - 1) {
      const auto to = static_cast<i32>(warp_shfl(static_cast<u32>(row), lowest_bit(holders)));
      for (i64 block = lane_id(); block < blocks; block += kWarpSize) {
        st(Ptr<float>{c_.op.rows_scales} + (to * c_.num_scale_blocks + first_block + block),
           ld(scales + block));
      }
    }
  }

  JAX_EP_DEVICE void expand_elements(Ptr<const std::byte> from, i32 row) {
    const Ptr<float> scales = c_.scales_behind(from);
    u32 holders = warp_ballot(row >= 0);
    for (; holders != 0; holders &= holders - 1) {
      const auto to = static_cast<i32>(warp_shfl(static_cast<u32>(row), lowest_bit(holders)));
      if (c_.restores()) {
        for (i64 c = lane_id(); c < c_.hidden; c += kWarpSize) {
          const float value = from_fp8(ld(as<const u8>(from) + c)) * ld(scales + c / kScaleBlock);
          st(as<Element>(c_.out_row(to)) + c, RowType::from_float(value));
        }
      } else if (c_.fp8_wire()) {
        c_.copy_elements(as<u8>(c_.out_row(to)), as<const u8>(from));
        c_.copy_scales(Ptr<float>{c_.op.rows_scales} + to * c_.num_scale_blocks, {scales.raw});
      } else if (!c_.weighted()) {
        c_.copy_elements(as<Element>(c_.out_row(to)), as<const Element>(from));
      }
    }
    if constexpr (Config::kProducts) products_.take_elements(row, as<const Element>(from));
  }

  // --- rows that hold no token -----------------------------------------------------------------

  // They are cleared in runs of as many rows as a warp has lanes.
  JAX_EP_DEVICE i32 num_clear_runs() const {
    if (!c_.op.zero_fill && c_.op.num_scalars == 0 && !c_.with_dots()) return 0;
    return static_cast<i32>(ceil_div(c_.shape.recv_capacity, kWarpSize));
  }
  JAX_EP_DEVICE void clear_rows_without_token(i32 run) const {
    const i64 first = i64{run} * kWarpSize;
    const i64 row = first + lane_id();
    const bool empty =
        row < c_.shape.recv_capacity && ld(Ptr<const i32>{c_.op.row_source} + row) < 0;
    for (u32 rows = warp_ballot(empty); rows != 0; rows &= rows - 1) {
      clear_row(first + lowest_bit(rows));
    }
  }

  JAX_EP_DEVICE void clear_row(i64 row) const {
    const i32 scalars = layout().scalars_per_row();
    if (c_.op.num_scalars > 0 && static_cast<i32>(lane_id()) < scalars) {
      st(Ptr<float>{c_.op.row_scalars} + (row * scalars + lane_id()), 0.0F);
    }
    if (c_.with_dots() && lane_id() == 0) st(Ptr<float>{c_.op.row_dots} + row, 0.0F);
    if (!c_.op.zero_fill) return;
    if (c_.op.rows_format == RowFormat::kFloat8E4M3) {
      for (i64 block = lane_id(); block < c_.num_scale_blocks; block += kWarpSize) {
        st(Ptr<float>{c_.op.rows_scales} + (row * c_.num_scale_blocks + block), 0.0F);
      }
    }
    const i64 bytes = c_.hidden * c_.rows_bytes;
    if (c_.bulk) {
      clear<Vec16>(c_.out_row(row), bytes);
    } else if (c_.rows_bytes == 1) {
      clear<u8>(c_.out_row(row), bytes);
    } else {
      clear<Element>(c_.out_row(row), bytes);
    }
  }

  Context& c_;
  bool calls_tail_;
  RowProducts<Config, RowType> products_{c_};
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_RECEIVER_H_
