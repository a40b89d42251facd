// SPDX-License-Identifier: Apache-2.0
// A low-latency combine: all warps sum the rows that this rank holds of other ranks' tokens and
// send the sums, then they sum what the ranks have sent for this rank's own tokens, in ascending
// order of the ranks. A warp does a segment of a token at a time. The order of all sums, and where
// they are rounded, is that of the high-throughput combine. In halves, the first one sends; where
// there are far ranks, of other domains, there are none.
#ifndef JAX_EP_CSRC_KERNELS_LOW_LATENCY_COMBINE_KERNEL_H_
#define JAX_EP_CSRC_KERNELS_LOW_LATENCY_COMBINE_KERNEL_H_

#include <type_traits>

#include "csrc/core/kernel_params.h"
#include "csrc/device/row_sum.h"
#include "csrc/device/segment_ring.h"
#include "csrc/device/token_selections.h"
#include "csrc/kernels/closed_results.h"
#include "csrc/kernels/high_throughput/combine_expert_layout.h"
#include "csrc/kernels/high_throughput/combine_rank_layout.h"
#include "csrc/kernels/low_latency/far_combine.h"
#include "csrc/kernels/low_latency/low_latency_exchange.h"
#include "csrc/kernels/low_latency/masking_exchange.h"
#include "csrc/kernels/low_latency/packets.h"

namespace jax_ep::dev {

template <int kWarpCount>
struct LowLatencyCombineConfig {
  static constexpr int kWarps = kWarpCount;
  static constexpr int kStages = 1;
  static constexpr int kSegmentBytes = kLowLatencyCombineSegmentBytes;

  struct SharedStorage {
    alignas(128) Shared<u32> stage[kWarps][kSegmentBytes / 4];
  };
};

// As far as the layouts of a combine need it. `kMasking`: ranks that do not come are left out, and
// said to be missing; within one domain, and in one piece.
template <typename BlockConfig, typename RowTypeOfCall, bool kMasking = false>
struct LowLatencyCombineContext {
  using Config = BlockConfig;
  using RowType = RowTypeOfCall;
  using Half = std::conditional_t<kMasking, MaskingExchange, ExchangeHalf>;
  static constexpr bool kMasks = kMasking;
  static constexpr i32 kElementBytes = sizeof(typename RowType::Element);

  JAX_EP_DEVICE explicit LowLatencyCombineContext(const CombineParams& params)
      : params(params),
        shape(params.op.shape),
        half(params),
        exchange(low_latency_exchange_of(params)),
        row_bytes(params.op.hidden * kElementBytes),
        segments(params.op.hidden, Config::kSegmentBytes / kElementBytes),
        rank(params.view.rank),
        num_ranks(params.view.num_ranks),
        num_topk(shape.num_topk) {}

  JAX_EP_DEVICE Ptr<const std::byte> y_row(i32 row) const {
    return Ptr<const std::byte>{static_cast<const std::byte*>(params.op.y)} + row * row_bytes;
  }
  JAX_EP_DEVICE float weight(i64 at) const { return ld(Ptr<const float>{params.op.weights} + at); }
  JAX_EP_DEVICE float row_scalar(i64 at) const {
    return ld(Ptr<const float>{params.op.row_scalars} + at);
  }

  const CombineParams& params;
  const EpShape& shape;
  const Half half;
  const Exchange exchange;
  const i64 row_bytes;
  const Segments segments;
  const i32 rank;
  const i32 num_ranks;
  const i32 num_topk;
};

// `RowLayout` is a combine's layout, of a LowLatencyCombineContext. `Far` is NoFarRanks or
// FarRanks.
template <typename RowLayout, typename Far = NoFarRanks>
class LowLatencyCombineKernel {
 public:
  static constexpr bool kHasTail = false;

  using Params = typename Far::template Params<CombineOp>;

  JAX_EP_DEVICE explicit LowLatencyCombineKernel(const Params& params)
      : c_(params), far_(c_.exchange, params) {}

  JAX_EP_DEVICE void run() {
    if (c_.exchange.closed()) return leave_no_results();
    if (c_.exchange.takes_part()) {
      c_.half.announce(c_.exchange, this_warp(), num_warps());
      if (c_.half.sends()) send();
      if (c_.half.receives()) receive();
    } else {
      c_.half.check_ticket(c_.exchange);
      if (c_.half.receives()) leave_empty_sums<RowType>(c_.exchange, c_.params.op);
      if constexpr (kMasks) close_if_last();
    }
    if constexpr (!kMasks) c_.half.finish(c_.exchange, far_);
  }

 private:
  using Context = typename RowLayout::Context;
  static constexpr bool kMasks = Context::kMasks;
  static_assert(!(kMasks && Far::kAny));
  using Config = typename Context::Config;
  using RowType = typename Context::RowType;
  static constexpr int kVectors = Config::kSegmentBytes / 16 / static_cast<int>(kWarpSize);
  // Of a lane, in a segment; and the elements of one.
  static constexpr int kPackets = Config::kSegmentBytes / kPacketDataBytes / kWarpSize;
  static constexpr int kPerPacket = 3 * RowType::kPerWord;
  static constexpr i32 kLanes = static_cast<i32>(kWarpSize);
  // Of which loads are in flight: masking kernels have no registers left for more.
  static constexpr int kTermsAtOnce = kMasks ? 1 : 3;

  JAX_EP_DEVICE static i32 this_warp() {
    return static_cast<i32>(warp_id() * num_blocks() + block_id());
  }
  JAX_EP_DEVICE static i32 num_warps() { return static_cast<i32>(num_blocks()) * Config::kWarps; }
  JAX_EP_DEVICE RowLayout layout() const { return RowLayout(c_); }
  JAX_EP_DEVICE i32 held_row(i32 owner, i64 token) const {
    return row_of_lane(
        c_.shape, RowLayout::kLayout, Ptr<const i32>{c_.params.op.source_slot}, owner, token);
  }
  JAX_EP_DEVICE Ptr<u32> stage() const {
    return address_of(shared<typename Config::SharedStorage>().stage[warp_id()][0]);
  }
  JAX_EP_DEVICE i32 num_words(i32 segment) const {
    return c_.segments.size(segment, c_.params.op.hidden) / RowType::kPerWord;
  }
  JAX_EP_DEVICE i64 packets_before(i32 segment) const { return i64{segment} * kPackets * kLanes; }

  // --- sums of this rank's rows ----------------------------------------------------------------
  // Read y, weights, row_topk_idx, source_slot. Write the owners' packets.

  JAX_EP_DEVICE void send() {
    if constexpr (Far::kAny) send_to_far_ranks();
    if constexpr (kMasks) {
      send(c_.half.wait_until_bank_is_free(c_.exchange));
    } else {
      c_.half.wait_until_bank_is_free(c_.exchange);
      send(AllPeers());
    }
  }
  // To the ranks that are `wanted(rank)`.
  template <typename Wanted>
  JAX_EP_DEVICE void send(const Wanted& wanted) {
    const i32 others = num_peers() - 1;
    for (i32 work_item = this_warp(); work_item < work_items_to_send(); work_item += num_warps()) {
      const i32 segment = work_item % c_.segments.count;
      const i32 owner_of_token = work_item / c_.segments.count;
      const i64 token = owner_of_token / others;
      const i32 owner = peer_at_turn(c_.exchange.view(), 1 + owner_of_token % others);
      if (owner < 0 || !wanted(owner)) continue;
      const SumTerms terms = layout().held_terms(held_row(owner, token));
      if (terms.count() == 0) continue;
      sum_to_stage(terms, segment);
      const u32 epoch = c_.exchange.epoch();
      send_words(
          packet_flag(epoch),
          peer_row_packets(c_.exchange.view(), owner, epoch, token) + packets_before(segment),
          stage(),
          num_words(segment));
      warp_sync();  // all packets have been read from the stage
    }
  }

  JAX_EP_DEVICE i32 num_peers() const {
    return Far::kAny ? c_.exchange.view().num_neighbors : c_.num_ranks;
  }
  JAX_EP_DEVICE i32 work_items_to_send() const {
    return static_cast<i32>(c_.shape.num_tokens) * (num_peers() - 1) * c_.segments.count;
  }

  JAX_EP_DEVICE FarCombine<RowLayout::kLayout, Context, Far> far_combine() const {
    return {c_, far_};
  }
  JAX_EP_DEVICE void send_to_far_ranks() const {
    far_combine().send(this_warp(), num_warps(), [this](i32 owner, i64 token, Ptr<std::byte> row) {
      const SumTerms terms = layout().held_terms(held_row(owner, token));
      for (i32 segment = 0; segment < c_.segments.count; ++segment) {
        sum_to_stage(terms, segment);
        const Ptr<Vec16> to = as<Vec16>(row + segment * Config::kSegmentBytes);
        // Each lane reads what it has stored itself: the stage is its own.
        for (i32 v = static_cast<i32>(lane_id()); v < num_words(segment) / 4; v += kLanes) {
          st(to + v, ld(as<Vec16>(stage()) + v));
        }
      }
    });
  }

  // All lanes. Loads of some terms are in flight at once.
  JAX_EP_DEVICE void sum_to_stage(const SumTerms& terms, i32 segment) const {
    const i32 vectors = num_words(segment) / 4;
    const auto load = [&](i32 term, Vec16(&row)[kVectors]) {
      const Ptr<const Vec16> from =
          as<const Vec16>(shfl_pointer(terms.row, term) + segment * Config::kSegmentBytes);
      JAX_EP_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const i32 at = static_cast<i32>(lane_id()) + v * kLanes;
        row[v] = at < vectors ? ld(from + at) : Vec16{};
      }
    };
    SegmentSum<RowType, kVectors> sum;
    if (terms.weights_per_row() > 1) {  // of the only term
      Vec16 row[kVectors];
      load(0, row);
      sum.add(row, terms.weights_per_row(), [&](i32 i) { return shfl_float(terms.weight, i); });
    } else {
      JAX_EP_NO_UNROLL
      for (i32 first = 0; first < terms.count(); first += kTermsAtOnce) {
        Vec16 rows[kTermsAtOnce][kVectors];
        JAX_EP_UNROLL
        for (int i = 0; i < kTermsAtOnce; ++i) {
          if (first + i < terms.count()) load(first + i, rows[i]);
        }
        JAX_EP_UNROLL
        for (int i = 0; i < kTermsAtOnce; ++i) {
          if (first + i < terms.count()) sum.add(shfl_float(terms.weight, first + i), rows[i]);
        }
      }
    }
    Vec16 rounded[kVectors];
    sum.take(rounded);
    JAX_EP_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const i32 at = static_cast<i32>(lane_id()) + v * kLanes;
      if (at < vectors) st(as<Vec16>(stage()) + at, rounded[v]);
    }
    warp_sync();
  }

  // --- sums over ranks -------------------------------------------------------------------------
  // Read this rank's packets, topk_idx, slot, and of its own tokens what is read above. Write out.

  // Masking kernels finish here, too.
  JAX_EP_DEVICE void receive() {
    c_.half.wait_for_peers(c_.exchange, this_warp(), num_warps());
    const i32 num_work_items = static_cast<i32>(c_.shape.num_tokens) * c_.segments.count;
    // The warps go on by turns, as if this were the rest of what is sent: who had none begins.
    const i32 sent = c_.half.sends() ? work_items_to_send() % num_warps() : 0;
    i32 first = this_warp() - sent + (this_warp() < sent ? num_warps() : 0);
    i32 step = num_warps();
    bool mends = false;
    JAX_EP_NO_UNROLL
    for (;;) {
      for (i32 work_item = first; work_item < num_work_items; work_item += step) {
        receive(work_item / c_.segments.count, work_item % c_.segments.count, mends);
      }
      if constexpr (Far::kAny) far_.wait_all(this_warp(), num_warps());
      if constexpr (kMasks) {
        // Who has been given up counts for no token, also where its sum has come: the last warp
        // makes all sums again. Those of the others are all there.
        if (!mends && close_if_last()) {
          mends = true;
          first = 0;
          step = 1;
          continue;
        }
        if (mends) Context::Half::close(c_.exchange);
      }
      return;
    }
  }
  // Whether this is the last warp and somebody is missing; else the exchange is closed.
  JAX_EP_DEVICE bool close_if_last() const {
    if (!c_.exchange.is_last_warp()) return false;
    if (Context::Half::report(c_.exchange, c_.params.op.missing_ranks)) return true;
    Context::Half::close(c_.exchange);
    return false;
  }

  // All lanes. `mends`: there is no sum of who has been given up.
  JAX_EP_DEVICE void receive(i64 token, i32 segment, bool mends) const {
    const i32 own_row = held_row(c_.rank, token);  // loaded together with what follows
    const Selections selections(
        c_.shape, Ptr<const i32>{c_.params.op.topk_idx}, Ptr<const i32>{c_.params.op.slot}, token);
    bool leads = selections.leads();
    if constexpr (kMasks) {
      if (mends && leads) leads = !MissingRanks(c_.exchange).is_given_up(selections.dest());
    }
    const u32 leaders = warp_ballot(leads);
    const SumTerms own = layout().held_terms(own_row);
    // A handle from elsewhere may have rows of a token that selects none.
    if (own.count() > 0) sum_to_stage(own, segment);
    sum_ranks(token, segment, source_of_lane(selections, leaders), leaders, own.count() > 0);
  }

  // Lane p gets the p-th of the ranks that hold the token, ascending. All lanes.
  JAX_EP_DEVICE i32 source_of_lane(const Selections& selections, u32 leaders) const {
    const u32 position = num_earlier(selections.dest(), leaders, c_.num_topk);
    const bool leads = (leaders >> lane_id() & 1) != 0;
    const i32 from = lane_with_position(leads ? static_cast<i32>(position) : -1, c_.num_topk);
    return static_cast<i32>(
        warp_shfl(static_cast<u32>(selections.dest()), static_cast<u32>(from < 0 ? 0 : from)));
  }

  // All lanes. A lane sums the elements of its packets; those of this rank's own sum are in the
  // stage, where they are replaced by the result.
  JAX_EP_DEVICE void sum_ranks(
      i64 token, i32 segment, i32 source_of_lane, u32 leaders, bool has_own) const {
    const auto num_sources = static_cast<i32>(count_bits(leaders));
    const i32 words = num_words(segment);
    float sum[kPackets][kPerPacket] = {};
    SumOfDomains<RowType, kPackets, Far::kAny> domains(c_.params.op);
    JAX_EP_NO_UNROLL
    for (i32 position = 0; position < num_sources; ++position) {
      const auto source =
          static_cast<i32>(warp_shfl(static_cast<u32>(source_of_lane), static_cast<u32>(position)));
      Packet packets[kPackets];
      if (source == c_.rank) {
        read_stage(words, has_own, packets);
      } else {
        receive_segment(source, token, segment, words, packets);
      }
      domains.begin(source, sum);
      add(packets, sum);
    }
    domains.end(sum);
    write_sum(token, segment, words, sum);
  }

  // How many of a segment's packets are this lane's.
  JAX_EP_DEVICE static i32 packets_of_lane(i32 words) {
    const auto packets = static_cast<i32>(ceil_div(words, 3));
    const i32 left = packets - static_cast<i32>(lane_id());
    return left <= 0 ? 0 : static_cast<i32>(ceil_div(left, kLanes));
  }
  JAX_EP_DEVICE void wait_segment(
      i32 source, i64 token, i32 segment, i32 words, Packet (&packets)[kPackets]) const {
    const RankView& view = c_.exchange.view();
    const Ptr<Packet> first =
        row_packets(view, c_.rank, c_.exchange.epoch(), source, token) + packets_before(segment);
    const auto from = [first](int i) { return first + (static_cast<i32>(lane_id()) + i * kLanes); };
    const i32 count = packets_of_lane(words);
    if constexpr (kMasks) {
      if (try_packets<kPackets, false>(c_.exchange, source, token, count, from, packets)) return;
      MissingRanks(c_.exchange).give_up_on(source);  // so all sums of the token are made again
      return;
    }
    wait_packets<kPackets>(c_.exchange, source, token, count, from, packets);
  }
  // The same of any other rank.
  JAX_EP_DEVICE void receive_segment(
      i32 source, i64 token, i32 segment, i32 words, Packet (&packets)[kPackets]) const {
    if constexpr (Far::kAny) {
      if (far_.has(source)) {
        const Ptr<const std::byte> row = far_combine().row(source, token);
        if (row.raw == nullptr) return read_words(0, {nullptr}, packets);
        return read_words(words, as<const u32>(row + segment * Config::kSegmentBytes), packets);
      }
    }
    wait_segment(source, token, segment, words, packets);
  }
  // Of a segment, as if they had come in packets; zeros where there are none.
  JAX_EP_DEVICE static void read_words(i32 words,
                                       Ptr<const u32> from,
                                       Packet (&packets)[kPackets]) {
    JAX_EP_UNROLL
    for (int i = 0; i < kPackets; ++i) {
      JAX_EP_UNROLL
      for (int c = 0; c < 3; ++c) {
        packets[i].data[c] = word_of(i, c) < words ? ld(from + word_of(i, c)) : 0;
      }
    }
  }
  JAX_EP_DEVICE static i32 word_of(int packet, int c) {
    return 3 * (static_cast<i32>(lane_id()) + packet * kLanes) + c;
  }
  JAX_EP_DEVICE void read_stage(i32 words, bool has_own, Packet (&packets)[kPackets]) const {
    read_words(has_own ? words : 0, Ptr<const u32>{stage().raw}, packets);
  }
  JAX_EP_DEVICE static void add(const Packet (&packets)[kPackets],
                                float (&sum)[kPackets][kPerPacket]) {
    JAX_EP_UNROLL
    for (int i = 0; i < kPackets; ++i) {
      float values[kPerPacket];
      JAX_EP_UNROLL
      for (int c = 0; c < 3; ++c) {
        RowType::unpack(packets[i].data[c], values + c * RowType::kPerWord);
      }
      JAX_EP_UNROLL
      for (int e = 0; e < kPerPacket; ++e) {
        sum[i][e] = fused_multiply_add(1.0F, values[e], sum[i][e]);
      }
    }
  }
  JAX_EP_DEVICE void write_sum(i64 token,
                               i32 segment,
                               i32 words,
                               const float (&sum)[kPackets][kPerPacket]) const {
    JAX_EP_UNROLL
    for (int i = 0; i < kPackets; ++i) {
      for (int c = 0; c < 3; ++c) {
        if (word_of(i, c) >= words) continue;
        st(stage() + word_of(i, c), RowType::pack(sum[i] + c * RowType::kPerWord));
      }
    }
    warp_sync();
    const auto to = as<Vec16>(Ptr<std::byte>{static_cast<std::byte*>(c_.params.op.out)} +
                              (token * c_.row_bytes + i64{segment} * Config::kSegmentBytes));
    for (i32 v = static_cast<i32>(lane_id()); v < words / 4; v += kLanes) {
      st(to + v, ld(as<Vec16>(stage()) + v));
    }
    warp_sync();  // before the stage is written to again
  }

  JAX_EP_DEVICE void leave_no_results() const {
    if (c_.half.receives()) {
      poison_sums<RowType>(c_.exchange, c_.params.op);
      if constexpr (kMasks) poison_missing_ranks(c_.exchange, c_.params.op.missing_ranks);
    } else {
      c_.half.poison_ticket(c_.exchange);
    }
    c_.exchange.report_closed();
  }

  Context c_;
  const Far far_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_LOW_LATENCY_COMBINE_KERNEL_H_
