// SPDX-License-Identifier: Apache-2.0
// Combine, where there are several domains: in the own one as with one domain
// (high_throughput/combine_kernel.h), and by the rails from the others, each of which sends one row
// for a token: the sum over its ranks, rounded (CombineOp::domain_size). Of a block's warps the
// first send to the domain, the next ones push, and the next ones reduce (rail_sums.h). Whoever is
// done receives.
//
// Nobody waits in a circle, as in internode/dispatch_kernel.h: pushers wait for units that have
// been reduced, reducers for pushers and for credits of a chunk before, receivers for what is
// delivered and for senders to the domain, which wait for no network.
#ifndef JAX_EP_CSRC_KERNELS_INTERNODE_COMBINE_KERNEL_H_
#define JAX_EP_CSRC_KERNELS_INTERNODE_COMBINE_KERNEL_H_

#include "csrc/kernels/high_throughput/combine_kernel.h"
#include "csrc/kernels/internode/rail_sums.h"

namespace jax_ep::dev {

// What has arrived for a token of this rank: a row of each rank of the domain that holds it, in
// this rank's staging, and a row of each other domain, in the receive ring.
template <typename Context, typename Transport>
class RailArrivals {
 public:
  JAX_EP_DEVICE RailArrivals(const Context& context,
                             const Rail<Transport>& rail,
                             const MessageLayout& message)
      : c_(context), staged_(context), rail_(rail), message_(message) {}

  JAX_EP_DEVICE bool is_term(const Selections& selections, i64 token) const {
    const i32 dest = selections.dest();
    const bool is_far = selections.live() && rail_.domain_of(dest) != rail_.domain();
    const u32 same_domain = warp_match(is_far ? static_cast<u32>(rail_.domain_of(dest)) : ~0U);
    if (!is_far) return staged_.is_term(selections, token);
    return lowest_bit(same_domain) == lane_id() && tokens_from(dest, token).has(index_of(token));
  }
  JAX_EP_DEVICE Ptr<const std::byte> row(i32 source, i64 token) const {
    if (rail_.domain_of(source) == rail_.domain()) return staged_.row(source, token);
    const i32 position = tokens_from(source, token).position(index_of(token));
    return message_from(source, token) + message_.row(position);
  }
  JAX_EP_DEVICE float scalar(i32 source, i64 token, u32 position) const {
    if (rail_.domain_of(source) == rail_.domain()) return staged_.scalar(source, token, position);
    const TokenSet tokens = tokens_from(source, token);
    // A handle from elsewhere.
    if (!tokens.has(index_of(token))) return 0.0F;
    const TokenScalars scalars(
        message_from(source, token) +
            message_.scalars(tokens.count(), tokens.position(index_of(token))),
        c_.num_topk);
    const u32 holders = scalars.holders();
    if ((holders >> rail_.index_of(source) & 1) == 0) return 0.0F;
    return ld(scalars.of(holders, rail_.index_of(source)) + position);
  }

 private:
  JAX_EP_DEVICE i32 chunk_of(i64 token) const {
    return static_cast<i32>(token / rail_.tokens_per_chunk());
  }
  JAX_EP_DEVICE i32 index_of(i64 token) const {
    return static_cast<i32>(token % rail_.tokens_per_chunk());
  }
  JAX_EP_DEVICE Ptr<const std::byte> message_from(i32 source, i64 token) const {
    return rail_.message(rail_.index(), rail_.domain_of(source), chunk_of(token));
  }
  JAX_EP_DEVICE TokenSet tokens_from(i32 source, i64 token) const {
    return read_header(message_from(source, token));
  }

  const Context& c_;
  const StagedSums<Context> staged_;
  const Rail<Transport>& rail_;
  const MessageLayout& message_;
};

// `RowLayout` is CombineExpertLayout or CombineRankLayout, of a CombineContext that sums over
// domains.
template <typename RowLayout, typename Transport>
class InternodeCombineKernel {
 public:
  static constexpr bool kHasTail = false;
  using Params = InternodeParams<CombineOp, Transport>;

  JAX_EP_DEVICE explicit InternodeCombineKernel(const Params& params)
      : c_(params),
        rail_(c_.exchange,
              params.network,
              params.transport,
              params.op.shape.num_tokens,
              params.network.layout.chunk_tokens),
        layouts_(layouts_of(params.network.layout)),
        num_pushers_(static_cast<u32>(params.num_rail_senders)),
        num_reducers_(static_cast<u32>(params.num_reducers)) {}

  JAX_EP_DEVICE void run() {
    if (c_.exchange.closed()) return poison_combined(c_);
    take_role();
    receive();
    c_.exchange.finish([this] {
      c_.exchange.acknowledge();
      if (lane_id() == 0) rail_.advance(/*with_units=*/true);
    });
  }

 private:
  using Context = typename RowLayout::Context;
  using Arrivals = RailArrivals<Context, Transport>;
  static_assert(Context::Config::kByDomain);

  JAX_EP_DEVICE CombineMessages layouts_of(const NetworkLayout& network) const {
    const i64 row_bytes = align_up(c_.row_bytes, 16);
    const bool has_scalars = c_.params.op.num_scalars > 0;
    return {.message = {.row_bytes = row_bytes,
                        .scalar_stride = has_scalars ? network.scalar_stride : 0},
            .unit = {.row_bytes = row_bytes,
                     .scalar_stride = has_scalars ? network.gather_scalars : 0}};
  }

  JAX_EP_DEVICE void take_role() {
    const u32 blocks = c_.exchange.num_main();
    // Of warps [first, first + count) of each block, this one's position among all.
    const auto position = [blocks](u32 first) {
      return static_cast<i32>((warp_id() - first) * blocks + block_id());
    };
    const u32 first_pusher = c_.num_senders;
    const u32 first_reducer = first_pusher + num_pushers_;
    if (warp_id() < first_pusher) {
      CombineSender<RowLayout>(c_).send();
    } else if (warp_id() < first_reducer) {
      CombinePusher<RowLayout, Transport>(c_, rail_, layouts_)
          .push(position(first_pusher), static_cast<i32>(num_pushers_ * blocks));
    } else if (warp_id() < first_reducer + num_reducers_) {
      CombineReducer<Context, Transport>(c_, rail_, layouts_)
          .reduce(position(first_reducer), static_cast<i32>(num_reducers_ * blocks));
    }
  }

  // Part by part of the rail chunks.
  JAX_EP_DEVICE void receive() {
    CombineReceiver<RowLayout, Arrivals> receiver(c_, Arrivals(c_, rail_, layouts_.message));
    for (WorkQueue work = c_.exchange.receiving_by_tickets(rail_.num_chunks() * kRailChunkParts);
         work.has_item();
         work.next()) {
      const i32 chunk = work.item() / kRailChunkParts;
      const ChunkPart part = part_of(chunk, work.item() % kRailChunkParts);
      wait_for(chunk, part);
      receiver.sum(part);
      warp_sync();
      if (lane_id() == 0) count_part(chunk);
    }
  }

  JAX_EP_DEVICE ChunkPart part_of(i32 chunk, i32 part_idx) const {
    ChunkPart part = part_of_rail_chunk(c_, rail_, chunk);
    const typename Rail<Transport>::TokenRange range = rail_.part(chunk, part_idx);
    part.first_token = range.first;
    part.last_token = range.last;
    return part;
  }

  // All lanes: until all has arrived of a part of a chunk.
  JAX_EP_DEVICE void wait_for(i32 chunk, const ChunkPart& part) const {
    for (i32 turn = static_cast<i32>(lane_id()); turn < rail_.num_others(); turn += kWarpSize) {
      rail_.wait_delivered(rail_.domain_at_turn(turn), chunk);
    }
    if (part.first_token < part.last_token) {
      const i32 per_chunk = c_.parts.per_chunk;
      const auto first = static_cast<i32>(part.first_token);
      const auto last = static_cast<i32>(part.last_token) - 1;
      const i32 first_flag = c_.parts.chunks.chunk_of(first) * per_chunk;
      const i32 last_flag = (c_.parts.chunks.chunk_of(last) + 1) * per_chunk;
      for (i32 flag_idx = first_flag; flag_idx < last_flag; ++flag_idx) {
        share_out_peers(c_.exchange.view(), [&](i32 source) {
          if (source != c_.rank) c_.exchange.wait_arrived(source, flag_idx);
        });
      }
    }
    warp_sync();
  }

  // One lane, when a part has been summed: with the last one the messages have been read.
  JAX_EP_DEVICE void count_part(i32 chunk) const {
    const Ptr<u32> word = rail_.parts_received(chunk);
    // RELEASE(parts): this warp's reads. ACQUIRE(parts) by who has the last part.
    if (fetch_add_acq_rel<Scope::kGpu>(word, 1) + 1 != kRailChunkParts) return;
    st(word, 0);
    for (i32 turn = 0; turn < rail_.num_others(); ++turn) {
      rail_.give_credit(rail_.domain_at_turn(turn), chunk);
    }
  }

  Context c_;
  const Rail<Transport> rail_;
  const CombineMessages layouts_;
  const u32 num_pushers_;
  const u32 num_reducers_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_INTERNODE_COMBINE_KERNEL_H_
