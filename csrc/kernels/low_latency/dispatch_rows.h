// SPDX-License-Identifier: Apache-2.0
// The rows of a low-latency dispatch: a warp sends, or expands, a segment of a token's row. All
// that a warp does to a segment it does in shared memory, where packets become words and words
// packets.
//
// The sender reads x, x_scales and topk_idx, and writes the peers' packets and what goes to far
// ranks. The receiver reads this rank's packets, what far ranks have sent, from x the rows that
// stay, and a plan, and writes rows and rows_scales.
#ifndef JAX_EP_CSRC_KERNELS_LOW_LATENCY_DISPATCH_ROWS_H_
#define JAX_EP_CSRC_KERNELS_LOW_LATENCY_DISPATCH_ROWS_H_

#include "csrc/core/ops.h"
#include "csrc/device/quantize.h"
#include "csrc/device/segment_ring.h"
#include "csrc/device/token_selections.h"
#include "csrc/kernels/low_latency/dispatch_block.h"
#include "csrc/kernels/low_latency/missing_ranks.h"
#include "csrc/kernels/low_latency/packets.h"

namespace jax_ep::dev {

template <typename Config, typename RowType, bool kHasFarRanks>
class DispatchRows {
 public:
  JAX_EP_DEVICE DispatchRows(const DispatchOp& op, const Exchange& exchange)
      : op_(op),
        exchange_(exchange),
        view_(exchange.view()),
        hidden_(op.hidden),
        fp8_wire_(op.wire == Wire::kFloat8E4M3),
        x_bytes_(element_bytes(op.x_format == RowFormat::kFloat8E4M3)),
        wire_bytes_(element_bytes(fp8_wire_)),
        rows_bytes_(element_bytes(op.rows_format == RowFormat::kFloat8E4M3)),
        segments_(op.hidden, segment_elements(op.wire)),
        packets_per_segment_(num_packets(i64{4} * staged_words(segments_.num_elements))),
        num_scale_blocks_(ceil_div(op.hidden, kScaleBlock)),
        // Rows that stay on this rank, and stay as they are, need no packets.
        unsent_rank_(fp8_wire_ ? -1 : exchange.view().rank) {}

  JAX_EP_DEVICE i32 num_segments() const { return segments_.count; }

  // All lanes: to the ranks that are `wanted(rank)`.
  template <typename Wanted = AllPeers>
  JAX_EP_DEVICE void send(i64 token, i32 segment, const Wanted& wanted = {}) {
    const UnplannedSelections selections(view_, op_.shape, Ptr<const i32>{op_.topk_idx}, token);
    bool sends = selections.leads() && selections.dest() != unsent_rank_;
    if constexpr (kHasFarRanks) sends = sends && is_neighbor(view_, selections.dest());
    u32 leaders = warp_ballot(sends && wanted(selections.dest()));
    if (leaders == 0) return;
    const i32 n = segments_.size(segment, hidden_);
    const Ptr<u32> stage = next_stage();
    load_x(token, segment, stage);
    to_wire(token, segment, stage);
    for (; leaders != 0; leaders &= leaders - 1) {
      const auto dest =
          static_cast<i32>(warp_shfl(static_cast<u32>(selections.dest()), lowest_bit(leaders)));
      send_words(packet_flag(exchange_.epoch()),
                 peer_row_packets(view_, dest, exchange_.epoch(), token) + packets_before(segment),
                 stage,
                 staged_words(n));
    }
  }

  // All lanes; each has a row of this rank that holds the token, or -1.
  JAX_EP_DEVICE void expand(i32 source, i64 token, i32 segment, i32 row) {
    if (warp_ballot(row >= 0) == 0) return;
    const Ptr<u32> stage = next_stage();
    if (source == unsent_rank_) {
      load_x(token, segment, stage);
    } else {
      receive_words<kPacketsAtOnce>(
          exchange_,
          source,
          token,
          row_packets(view_, view_.rank, exchange_.epoch(), source, token) +
              packets_before(segment),
          stage,
          staged_words(segments_.size(segment, hidden_)));
    }
    write_rows(stage, segment, row);
  }

  // The same where the source may be missing. Whether all of the segment has come; if not, nothing
  // is written.
  JAX_EP_DEVICE bool try_expand(i32 source, i64 token, i32 segment, i32 row) {
    if (source == unsent_rank_) {
      expand(source, token, segment, row);
      return true;
    }
    if (warp_ballot(row >= 0) == 0) return true;
    const Ptr<u32> stage = next_stage();
    const bool came = try_words<kPacketsAtOnce>(
        exchange_,
        source,
        token,
        row_packets(view_, view_.rank, exchange_.epoch(), source, token) + packets_before(segment),
        stage,
        staged_words(segments_.size(segment, hidden_)));
    if (warp_ballot(!came) != 0) {
      bulk_commit();  // of nothing: the stages are counted by groups
      return false;
    }
    write_rows(stage, segment, row);
    return true;
  }

  // A row as a far rank gets it: its segments one behind the other, each as in a stage.
  JAX_EP_DEVICE i64 packed_bytes() const {
    const i32 last = segments_.count - 1;
    return packed_before(last) + 4 * i64{staged_words(segments_.size(last, hidden_))};
  }
  // All lanes: stores a segment of a token of this rank into such a row.
  JAX_EP_DEVICE void pack(i64 token, i32 segment, Ptr<std::byte> row) {
    const Ptr<u32> stage = next_stage();
    load_x(token, segment, stage);
    to_wire(token, segment, stage);
    const Ptr<Vec16> to = as<Vec16>(row + packed_before(segment));
    const i32 vectors = staged_words(segments_.size(segment, hidden_)) / 4;
    for (i32 i = static_cast<i32>(lane_id()); i < vectors; i += static_cast<i32>(kWarpSize)) {
      st(to + i, ld(as<Vec16>(stage) + i));
    }
  }
  // All lanes: as `expand`, of such a row; one lane at least has a row.
  JAX_EP_DEVICE void expand_packed(Ptr<const std::byte> packed, i32 segment, i32 row) {
    const Ptr<u32> stage = next_stage();
    load(as<const Vec16>(packed + packed_before(segment)),
         staged_words(segments_.size(segment, hidden_)) / 4,
         stage);
    write_rows(stage, segment, row);
  }

  // All lanes: what a row holds that no token has. `again`: a part of one may have been written.
  JAX_EP_DEVICE void clear(i64 row, bool again = false) const {
    const i64 scalars = op_.shape.scalars_per_row();
    if (op_.num_scalars > 0 && static_cast<i64>(lane_id()) < scalars) {
      st(Ptr<float>{op_.row_scalars} + (row * scalars + lane_id()), 0.0F);
    }
    if (!op_.zero_fill && !again) return;
    if (op_.rows_format == RowFormat::kFloat8E4M3) {
      for (i64 block = lane_id(); block < num_scale_blocks_; block += kWarpSize) {
        st(Ptr<float>{op_.rows_scales} + (row * num_scale_blocks_ + block), 0.0F);
      }
    }
    dev::clear<Vec16>(out_row(row), hidden_ * rows_bytes_);
  }

 private:
  using Element = typename RowType::Element;
  // Loads in flight of a lane: all of a segment.
  static constexpr i32 kPacketsAtOnce =
      Config::kSegmentBytes / static_cast<i32>(kPacketDataBytes * kWarpSize);

  JAX_EP_DEVICE static i32 element_bytes(bool fp8) {
    return fp8 ? 1 : static_cast<i32>(sizeof(Element));
  }
  // Scales are moved 16 bytes at a time, so FP8 segments have four blocks of elements, or eight,
  // ...
  JAX_EP_DEVICE static i32 segment_elements(Wire wire) {
    constexpr i32 kMost = Config::kSegmentBytes / static_cast<i32>(sizeof(Element));
    constexpr i32 kFourBlocks = 4 * static_cast<i32>(kScaleBlock);
    return wire == Wire::kFloat8E4M3 ? kMost / kFourBlocks * kFourBlocks : kMost;
  }
  JAX_EP_DEVICE bool restores() const { return fp8_wire_ && op_.rows_format == RowFormat::kDType; }
  JAX_EP_DEVICE i32 staged_words(i32 num_elements) const {
    const auto words = static_cast<i32>(ceil_div(i64{num_elements} * wire_bytes_, 4));
    return words + (fp8_wire_ ? static_cast<i32>(num_staged_scales(num_elements)) : 0);
  }
  JAX_EP_DEVICE i64 packets_before(i32 segment) const {
    return i64{segment} * packets_per_segment_;
  }
  JAX_EP_DEVICE i64 packed_before(i32 segment) const {
    return i64{segment} * (4 * staged_words(segments_.num_elements));
  }
  JAX_EP_DEVICE Ptr<std::byte> out_row(i64 row) const {
    return Ptr<std::byte>{static_cast<std::byte*>(op_.rows)} + row * hidden_ * rows_bytes_;
  }

  // The stages by turns: bulk stores may still read from the other one. All lanes.
  JAX_EP_DEVICE Ptr<u32> next_stage() {
    bulk_wait_read<1>();
    warp_sync();
    auto& stages = shared<typename Config::SharedStorage>().stage[warp_id()];
    return address_of(stages[stage_++ % Config::kStages][0]);
  }

  JAX_EP_DEVICE void load_x(i64 token, i32 segment, Ptr<u32> stage) const {
    const auto from = Ptr<const std::byte>{static_cast<const std::byte*>(op_.x)} +
                      (token * hidden_ + segments_.first(segment)) * x_bytes_;
    load(as<const Vec16>(from), segments_.size(segment, hidden_) * x_bytes_ / 16, stage);
  }
  JAX_EP_DEVICE static void load(Ptr<const Vec16> from, i32 vectors, Ptr<u32> stage) {
    constexpr auto kVectors = static_cast<int>(ceil_div(Config::kSegmentBytes / 16, kWarpSize));
    const auto at = [](int v) {
      return static_cast<i32>(lane_id()) + v * static_cast<i32>(kWarpSize);
    };
    Vec16 vector[kVectors];  // all loads are in flight at once
    JAX_EP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (at(v) < vectors) vector[v] = ld(from + at(v));
    }
    JAX_EP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      if (at(v) < vectors) st(as<Vec16>(stage) + at(v), vector[v]);
    }
  }

  // What has come to the stage goes to every row that holds the token. All lanes.
  JAX_EP_DEVICE void write_rows(Ptr<u32> stage, i32 segment, i32 row) {
    const i32 n = segments_.size(segment, hidden_);
    if (fp8_wire_) warp_sync();  // lanes read what others wrote
    if (restores()) {
      restore_segment<RowType>(stage, n);
    } else {
      if (fp8_wire_) expand_scales(stage, segment, row);
      fence_proxy_async_shared();  // the copy engine sees what the lanes wrote
      warp_sync();
    }
    if (row >= 0) {
      bulk_store(out_row(row) + segments_.first(segment) * rows_bytes_,
                 stage,
                 static_cast<u32>(n * rows_bytes_));
    }
    bulk_commit();
  }

  // What x has in the stage becomes what travels. All lanes.
  JAX_EP_DEVICE void to_wire(i64 token, i32 segment, Ptr<u32> stage) const {
    warp_sync();
    if (!fp8_wire_) return;
    const i32 n = segments_.size(segment, hidden_);
    if (op_.x_format == RowFormat::kDType) {
      quantize_segment<RowType>(stage, n);
      return;
    }
    const i64 block = segments_.first(segment) / kScaleBlock + lane_id();
    const bool is_block = static_cast<i64>(lane_id()) * kScaleBlock < n;
    const auto scales = Ptr<const float>{op_.x_scales} + token * num_scale_blocks_;
    complete_segment(stage, n, is_block ? ld(scales + block) : 0.0F);
  }

  // Copies a segment's scales to every row that holds the token. All lanes.
  JAX_EP_DEVICE void expand_scales(Ptr<u32> stage, i32 segment, i32 row) const {
    const i32 n = segments_.size(segment, hidden_);
    const i64 first_block = segments_.first(segment) / kScaleBlock;
    const i64 blocks = ceil_div(n, kScaleBlock);
    u32 holders = warp_ballot(row >= 0);
    for (; holders != 0; holders &= holders - 1) {
      const auto to = static_cast<i32>(warp_shfl(static_cast<u32>(row), lowest_bit(holders)));
      for (i64 block = lane_id(); block < blocks; block += kWarpSize) {
        st(Ptr<float>{op_.rows_scales} + (to * num_scale_blocks_ + first_block + block),
           ld(scales_in(stage, n) + block));
      }
    }
  }

  const DispatchOp& op_;
  const Exchange& exchange_;
  const RankView& view_;
  const i64 hidden_;
  const bool fp8_wire_;
  const i32 x_bytes_;  // of an element of x, on the wire, and of rows
  const i32 wire_bytes_;
  const i32 rows_bytes_;
  const Segments segments_;
  const i64 packets_per_segment_;
  const i64 num_scale_blocks_;
  const i32 unsent_rank_;  // -1: none
  u32 stage_ = 0;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_LOW_LATENCY_DISPATCH_ROWS_H_
