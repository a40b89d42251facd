// SPDX-License-Identifier: Apache-2.0
// Dispatch: a block's first warps send this rank's rows, each once per destination rank, into the
// destinations' staging; meanwhile the others expand what arrives to the rows of the receive
// buffer, and so do the first, when they have sent. All work chunk by chunk.
//
// Rows whose bytes are a multiple of 16 travel by bulk copies through shared memory; others element
// by element.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_KERNEL_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_KERNEL_H_

#include "csrc/device/exchange.h"
#include "csrc/device/quantize.h"
#include "csrc/device/segment_ring.h"
#include "csrc/device/token_selections.h"
#include "csrc/kernels/high_throughput/dispatch_config.h"

namespace jax_ep::dev {

template <typename Config, typename RowType>
class DispatchKernel {
 public:
  JAX_EP_DEVICE explicit DispatchKernel(const DispatchParams& params)
      : params_(params),
        shape_(params.op.shape),
        exchange_(params.view,
                  Channel::kHighThroughput,
                  OpKind::kDispatch,
                  params.call_tag,
                  params.program_rank),
        ring_(shared<typename Config::SharedStorage>().stages[warp_id()]),
        hidden_(params.op.hidden),
        x_bytes_(element_bytes(params.op.x_format == RowFormat::kFloat8E4M3)),
        wire_bytes_(element_bytes(params.op.wire == Wire::kFloat8E4M3)),
        rows_bytes_(element_bytes(params.op.rows_format == RowFormat::kFloat8E4M3)),
        bulk_(hidden_ * min_of(min_of(x_bytes_, wire_bytes_), rows_bytes_) % 16 == 0),
        segments_(hidden_,
                  Config::Stages::kSegmentBytes / static_cast<i32>(sizeof(Element)),
                  // Rows, and the scales behind them, are copied 16 bytes at a time.
                  params.op.wire == Wire::kFloat8E4M3 ? 4 * static_cast<i32>(kScaleBlock)
                                                      : 16 / static_cast<i32>(sizeof(Element))),
        num_blocks_(ceil_div(hidden_, kScaleBlock)),
        // Rows that stay on this rank, and stay as they are, need no staging.
        unstaged_rank_(params.op.wire == Wire::kSame ? params.view.rank : -1),
        rank_(params.view.rank),
        num_ranks_(params.view.num_ranks),
        num_topk_(shape_.num_topk),
        num_tokens_(shape_.num_tokens),
        chunk_tokens_(chunk_tokens(num_tokens_, params.view.chunk_target)),
        num_chunks_(num_chunks(num_tokens_, params.view.chunk_target)),
        num_parts_(bulk_ ? num_parts(num_chunks_, segments_.count, params.view.chunk_target) : 1) {}

  JAX_EP_DEVICE void run() {
    if (exchange_.closed()) return leave_no_results();
    if (warp_id() < Config::kSenders) send();
    receive();
    bulk_wait<0>();
    exchange_.finish();
  }

 private:
  using Element = typename RowType::Element;

  JAX_EP_DEVICE static i32 element_bytes(bool fp8) {
    return fp8 ? 1 : static_cast<i32>(sizeof(Element));
  }
  JAX_EP_DEVICE static i32 min_of(i32 a, i32 b) { return a < b ? a : b; }
  JAX_EP_DEVICE bool is_rank_major() const { return shape_.layout == Layout::kRank; }
  JAX_EP_DEVICE bool fp8_wire() const { return params_.op.wire == Wire::kFloat8E4M3; }
  JAX_EP_DEVICE bool quantizes() const {
    return fp8_wire() && params_.op.x_format == RowFormat::kDType;
  }
  JAX_EP_DEVICE bool restores() const {
    return fp8_wire() && params_.op.rows_format == RowFormat::kDType;
  }
  JAX_EP_DEVICE i64 first_token(i32 chunk) const { return i64{chunk} * chunk_tokens_; }
  JAX_EP_DEVICE i64 last_token(i32 chunk) const {
    const i64 last = first_token(chunk) + chunk_tokens_;
    return last < num_tokens_ ? last : num_tokens_;
  }
  JAX_EP_DEVICE Ptr<const std::byte> x_row(i64 token) const {
    return Ptr<const std::byte>{static_cast<const std::byte*>(params_.op.x)} +
           token * hidden_ * x_bytes_;
  }
  JAX_EP_DEVICE Ptr<std::byte> out_row(i64 row) const {
    return Ptr<std::byte>{static_cast<std::byte*>(params_.op.rows)} + row * hidden_ * rows_bytes_;
  }

  // --- the senders -----------------------------------------------------------------------------
  // Read x, x_scales, token_scalars, topk_idx, slot. Write the peers' staging. Wait for
  // acknowledged, signal arrived.

  JAX_EP_DEVICE void send() {
    const auto warp = static_cast<i32>(block_id() * Config::kSenders + warp_id());
    const auto num_warps = static_cast<i32>(num_blocks() * Config::kSenders);
    const i32 num_flags = num_chunks_ * num_parts_;
    if (warp >= num_flags) return;
    exchange_.wait_until_writable();
    for (i32 flag_idx = warp; flag_idx < num_flags; flag_idx += num_warps) {
      const i64 first = first_token(flag_idx / num_parts_);
      const i64 last = last_token(flag_idx / num_parts_);
      if (hidden_ > 0 && bulk_) {
        send_segments(first, last, flag_idx % num_parts_);
      } else {
        for (i64 token = first; token < last; ++token) {
          const Selections selections = selections_of(token);
          send_scalars(selections, token);
          if (hidden_ > 0) send_elements(selections, token);
        }
      }
      // Not only read: the rows are in the peers' memory before the chunk is said to be.
      bulk_wait<0>();
      exchange_.signal_arrived(flag_idx);
    }
  }

  JAX_EP_DEVICE Selections selections_of(i64 token) const {
    return Selections(
        shape_, Ptr<const i32>{params_.op.topk_idx}, Ptr<const i32>{params_.op.slot}, token);
  }

  JAX_EP_DEVICE i32 first_segment(i32 part) const { return part * segments_.count / num_parts_; }

  JAX_EP_DEVICE void send_segments(i64 first, i64 last, i32 part) {
    const auto needed = [this](i64 token) { return warp_ballot(selections_of(token).live()) != 0; };
    const auto source_of = [this](i64 token, i32 segment) {
      return SegmentSource{x_row(token) + segments_.first(segment) * x_bytes_,
                           static_cast<u32>(segments_.size(segment, hidden_) * x_bytes_)};
    };
    stream_segments(ring_,
                    first,
                    last,
                    first_segment(part),
                    first_segment(part + 1),
                    needed,
                    source_of,
                    [this](i64 token, i32 segment, Ptr<u32> stage) {
                      const Selections selections = selections_of(token);
                      if (segment == 0) send_scalars(selections, token);
                      send_segment(selections, token, segment, stage);
                    });
  }

  JAX_EP_DEVICE void send_segment(const Selections& selections,
                                  i64 token,
                                  i32 segment,
                                  Ptr<u32> stage) {
    const i32 num_elements = segments_.size(segment, hidden_);
    const i64 first = segments_.first(segment);
    if (quantizes()) {
      quantize_segment<RowType>(stage, num_elements);
    } else if (fp8_wire()) {
      const i64 block = first / kScaleBlock + lane_id();
      const bool is_block = static_cast<i64>(lane_id()) * kScaleBlock < num_elements;
      const auto scales = Ptr<const float>{params_.op.x_scales} + token * num_blocks_;
      complete_segment(stage, num_elements, is_block ? ld(scales + block) : 0.0F);
    }
    if (!selections.leads() || selections.dest() == unstaged_rank_) return;
    put_segment(exchange_.view(),
                selections.dest(),
                token,
                staged_at(first),
                stage,
                staged_bytes(num_elements));
  }

  // Where a segment lies in a staged row, and how long it is.
  JAX_EP_DEVICE i64 staged_at(i64 first) const {
    return first * wire_bytes_ + (fp8_wire() ? first / kScaleBlock * 4 : 0);
  }
  JAX_EP_DEVICE u32 staged_bytes(i32 num_elements) const {
    return static_cast<u32>(num_elements * wire_bytes_) +
           (fp8_wire() ? 4 * num_staged_scales(num_elements) : 0);
  }

  JAX_EP_DEVICE void send_scalars(const Selections& selections, i64 token) {
    if (params_.op.num_scalars == 0) return;
    const u32 lane = lane_id();
    const bool is_selection = lane < static_cast<u32>(num_topk_);
    const float scalar =
        is_selection ? ld(Ptr<const float>{params_.op.token_scalars} + (token * num_topk_ + lane))
                     : 0.0F;
    if (!is_rank_major()) {
      const u32 position = selections.position(num_topk_);
      if (!selections.live()) return;
      put_scalar(exchange_.view(), selections.dest(), token, num_topk_, position, scalar);
      return;
    }
    u32 leaders = warp_ballot(selections.leads());
    for (; leaders != 0; leaders &= leaders - 1) {
      const auto dest =
          static_cast<i32>(warp_shfl(static_cast<u32>(selections.dest()), lowest_bit(leaders)));
      if (!is_selection) continue;
      put_scalar(exchange_.view(),
                 dest,
                 token,
                 num_topk_,
                 lane,
                 selections.dest() == dest ? scalar : 0.0F);
    }
  }

  JAX_EP_DEVICE void send_elements(const Selections& selections, i64 token) {
    u32 leaders = warp_ballot(selections.leads() && selections.dest() != unstaged_rank_);
    for (; leaders != 0; leaders &= leaders - 1) {
      const auto dest =
          static_cast<i32>(warp_shfl(static_cast<u32>(selections.dest()), lowest_bit(leaders)));
      const Ptr<std::byte> to = peer_row(exchange_.view(), dest, token);
      if (quantizes()) {
        quantize_elements(token, to);
      } else if (fp8_wire()) {
        copy_elements(as<u8>(to), as<const u8>(x_row(token)));
        copy_scales(scales_behind(to), Ptr<const float>{params_.op.x_scales} + token * num_blocks_);
      } else {
        copy_elements(as<Element>(to), as<const Element>(x_row(token)));
      }
    }
  }

  template <typename T>
  JAX_EP_DEVICE void copy_elements(Ptr<T> to, Ptr<const T> from) const {
    for (i64 i = lane_id(); i < hidden_; i += kWarpSize) st(to + i, ld(from + i));
  }
  JAX_EP_DEVICE void copy_scales(Ptr<float> to, Ptr<const float> from) const {
    for (i64 i = lane_id(); i < num_blocks_; i += kWarpSize) st(to + i, ld(from + i));
  }

  // Rows that are copied element by element have all their scales at the end.
  template <typename Byte>
  JAX_EP_DEVICE Ptr<float> scales_behind(Ptr<Byte> row) const {
    return {as<float>(Ptr<std::byte>{const_cast<std::byte*>(row.raw)} + align_up(hidden_, 4))};
  }

  JAX_EP_DEVICE void quantize_elements(i64 token, Ptr<std::byte> to) const {
    for (i64 block = 0; block < num_blocks_; ++block) {
      const BlockOfElements<RowType> elements(as<const Element>(x_row(token)), block, hidden_);
      const Divider scaled(elements.scale);
      for (int i = 0; i < elements.kPerLane; ++i) {
        const i64 element = elements.element(block, i);
        if (element >= hidden_) continue;
        st(as<u8>(to) + element, to_fp8(scaled(elements.value[i])));
      }
      if (lane_id() == 0) st(scales_behind(to) + block, elements.scale);
    }
  }

  // --- the receivers ---------------------------------------------------------------------------
  // Read this rank's staging, source_slot, row_source; rows that stay, from x. Write rows,
  // rows_scales, row_scalars. Wait for arrived.

  JAX_EP_DEVICE void receive() {
    // Neighboring chunks to different blocks; warps that also send come last.
    const u32 late = (warp_id() + Config::kWarps - Config::kSenders) % Config::kWarps;
    const auto warp = static_cast<i32>(late * num_blocks() + block_id());
    const auto num_warps = static_cast<i32>(num_blocks() * Config::kWarps);
    clear_rows_without_token(warp, num_warps);
    // In the order in which chunks arrive; each rank begins with itself.
    const i64 num_items = i64{num_chunks_} * num_parts_ * num_ranks_;
    for (i64 item = warp; item < num_items; item += num_warps) {
      const auto flag_idx = static_cast<i32>(item / num_ranks_);
      const i32 source = peer_at_turn(exchange_.view(), static_cast<i32>(item % num_ranks_));
      if (source < 0) continue;
      if (lane_id() == 0) exchange_.wait_arrived(source, flag_idx);
      warp_sync();
      // The copy engine, too, sees what has arrived.
      fence_proxy_async();
      const i64 first = first_token(flag_idx / num_parts_);
      const i64 last = last_token(flag_idx / num_parts_);
      if (hidden_ > 0 && bulk_) {
        expand_segments(source, first, last, flag_idx % num_parts_);
        continue;
      }
      for (i64 token = first; token < last; ++token) {
        const i32 row = row_of_lane(source, token);
        expand_scalars(source, token, row);
        if (hidden_ > 0) expand_elements(source, token, row);
      }
    }
  }

  // Lane j gets the j-th row of this rank that holds the token; -1: it has none.
  JAX_EP_DEVICE i32 row_of_lane(i32 source, i64 token) const {
    const i32 max_rows = max_rows_per_token(shape_.layout, num_topk_, shape_.num_local_experts());
    if (static_cast<i32>(lane_id()) >= max_rows) return -1;
    const i64 global_token = source * num_tokens_ + token;
    const i32 row =
        ld(Ptr<const i32>{params_.op.source_slot} + (global_token * max_rows + lane_id()));
    return row < shape_.recv_capacity ? row : -1;
  }

  JAX_EP_DEVICE Ptr<const std::byte> arrived_row(i32 source, i64 token) const {
    if (source == unstaged_rank_) return x_row(token);
    const Ptr<std::byte> row = staged_row(exchange_.view(), rank_, source, token);
    return {row.raw};
  }

  JAX_EP_DEVICE void expand_segments(i32 source, i64 first, i64 last, i32 part) {
    const auto needed = [this, source](i64 token) {
      return warp_ballot(row_of_lane(source, token) >= 0) != 0;
    };
    const auto source_of = [this, source](i64 token, i32 segment) {
      return SegmentSource{arrived_row(source, token) + staged_at(segments_.first(segment)),
                           staged_bytes(segments_.size(segment, hidden_))};
    };
    stream_segments(ring_,
                    first,
                    last,
                    first_segment(part),
                    first_segment(part + 1),
                    needed,
                    source_of,
                    [this, source](i64 token, i32 segment, Ptr<u32> stage) {
                      const i32 row = row_of_lane(source, token);
                      if (segment == 0) expand_scalars(source, token, row);
                      expand_segment(row, segment, stage);
                    });
  }

  JAX_EP_DEVICE void expand_segment(i32 row, i32 segment, Ptr<u32> stage) {
    const i32 num_elements = segments_.size(segment, hidden_);
    const i64 first = segments_.first(segment);
    if (restores()) {
      restore_segment<RowType>(stage, num_elements);
    } else if (fp8_wire()) {
      expand_scales(scales_in(stage, num_elements),
                    first / kScaleBlock,
                    ceil_div(num_elements, kScaleBlock),
                    row);
    }
    if (row < 0) return;
    bulk_store(
        out_row(row) + first * rows_bytes_, stage, static_cast<u32>(num_elements * rows_bytes_));
  }

  // Copies the scales of some blocks of a row to every row that holds the token.
  JAX_EP_DEVICE void expand_scales(Ptr<float> scales, i64 first_block, i64 blocks, i32 row) {
    u32 holders = warp_ballot(row >= 0);
    for (; holders != 0; holders &= holders - 1) {
      const auto to = static_cast<i32>(warp_shfl(static_cast<u32>(row), lowest_bit(holders)));
      for (i64 block = lane_id(); block < blocks; block += kWarpSize) {
        st(Ptr<float>{params_.op.rows_scales} + (to * num_blocks_ + first_block + block),
           ld(scales + block));
      }
    }
  }

  JAX_EP_DEVICE void expand_scalars(i32 source, i64 token, i32 row) {
    if (params_.op.num_scalars == 0) return;
    const u32 lane = lane_id();
    const Ptr<float> scalars = staged_scalars(exchange_.view(), rank_, source, token, num_topk_);
    if (!is_rank_major()) {
      if (row >= 0) st(Ptr<float>{params_.op.row_scalars} + row, ld(scalars + lane));
      return;
    }
    const auto to = static_cast<i32>(warp_shfl(static_cast<u32>(row), 0));
    if (to < 0 || lane >= static_cast<u32>(num_topk_)) return;
    st(Ptr<float>{params_.op.row_scalars} + (i64{to} * num_topk_ + lane), ld(scalars + lane));
  }

  JAX_EP_DEVICE void expand_elements(i32 source, i64 token, i32 row) {
    const Ptr<const std::byte> from = arrived_row(source, token);
    const Ptr<float> scales = scales_behind(from);
    u32 holders = warp_ballot(row >= 0);
    for (; holders != 0; holders &= holders - 1) {
      const auto to = static_cast<i32>(warp_shfl(static_cast<u32>(row), lowest_bit(holders)));
      if (restores()) {
        for (i64 c = lane_id(); c < hidden_; c += kWarpSize) {
          const float value = from_fp8(ld(as<const u8>(from) + c)) * ld(scales + c / kScaleBlock);
          st(as<Element>(out_row(to)) + c, RowType::from_float(value));
        }
      } else if (fp8_wire()) {
        copy_elements(as<u8>(out_row(to)), as<const u8>(from));
        copy_scales(Ptr<float>{params_.op.rows_scales} + to * num_blocks_, {scales.raw});
      } else {
        copy_elements(as<Element>(out_row(to)), as<const Element>(from));
      }
    }
  }

  // --- rows that hold no token -----------------------------------------------------------------

  JAX_EP_DEVICE void clear_rows_without_token(i32 warp, i32 num_warps) {
    if (!params_.op.zero_fill && params_.op.num_scalars == 0) return;
    const i64 capacity = shape_.recv_capacity;
    for (i64 first = i64{warp} * kWarpSize; first < capacity; first += i64{num_warps} * kWarpSize) {
      const i64 row = first + lane_id();
      const bool empty = row < capacity && ld(Ptr<const i32>{params_.op.row_source} + row) < 0;
      for (u32 rows = warp_ballot(empty); rows != 0; rows &= rows - 1) {
        clear_row(first + lowest_bit(rows));
      }
    }
  }

  JAX_EP_DEVICE void clear_row(i64 row) {
    const i32 scalars = is_rank_major() ? num_topk_ : 1;
    if (params_.op.num_scalars > 0 && static_cast<i32>(lane_id()) < scalars) {
      st(Ptr<float>{params_.op.row_scalars} + (row * scalars + lane_id()), 0.0F);
    }
    if (!params_.op.zero_fill) return;
    if (params_.op.rows_format == RowFormat::kFloat8E4M3) {
      for (i64 block = lane_id(); block < num_blocks_; block += kWarpSize) {
        st(Ptr<float>{params_.op.rows_scales} + (row * num_blocks_ + block), 0.0F);
      }
    }
    const i64 bytes = hidden_ * rows_bytes_;
    if (bulk_) {
      clear<Vec16>(out_row(row), bytes);
    } else if (rows_bytes_ == 1) {
      clear<u8>(out_row(row), bytes);
    } else {
      clear<Element>(out_row(row), bytes);
    }
  }
  template <typename T>
  JAX_EP_DEVICE static void clear(Ptr<std::byte> to, i64 bytes) {
    const i64 count = bytes / static_cast<i64>(sizeof(T));
    for (i64 i = lane_id(); i < count; i += kWarpSize) st(as<T>(to) + i, T{});
  }

  // --- when the group has been closed ----------------------------------------------------------

  JAX_EP_DEVICE void leave_no_results() {
    const i64 capacity = shape_.recv_capacity;
    const i64 elements = capacity * hidden_;
    if (params_.op.rows_format == RowFormat::kFloat8E4M3) {
      exchange_.poison(static_cast<u8*>(params_.op.rows), elements);
      exchange_.poison(reinterpret_cast<u32*>(params_.op.rows_scales), capacity * num_blocks_);
    } else {
      exchange_.poison(static_cast<Element*>(params_.op.rows), elements);
    }
    if (params_.op.num_scalars > 0) {
      const i64 scalars = is_rank_major() ? num_topk_ : 1;
      exchange_.poison(reinterpret_cast<u32*>(params_.op.row_scalars), capacity * scalars);
    }
    exchange_.report_closed();
  }

  const DispatchParams& params_;
  const EpShape& shape_;
  const Exchange exchange_;
  SegmentRing<typename Config::Stages> ring_;
  const i64 hidden_;
  const i32 x_bytes_;  // of an element of x, on the wire, and of rows
  const i32 wire_bytes_;
  const i32 rows_bytes_;
  const bool bulk_;
  const Segments segments_;
  const i64 num_blocks_;     // of elements that share a scale
  const i32 unstaged_rank_;  // the rank whose rows are not staged; -1: none
  const i32 rank_;
  const i32 num_ranks_;
  const i32 num_topk_;
  const i64 num_tokens_;
  const i32 chunk_tokens_;
  const i32 num_chunks_;
  const i32 num_parts_;  // of a row: runs of segments
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_DISPATCH_KERNEL_H_
