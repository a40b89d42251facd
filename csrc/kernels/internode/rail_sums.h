// SPDX-License-Identifier: Apache-2.0
// What a domain sends back of a combine. Its ranks *push*: each sums the rows that it holds of a
// rail chunk of another domain's rank, and stores a row for each token at the rank of its own
// domain that is on the owner's rail. That one *reduces*: it adds up, in the order of the ranks,
// and sends the rounded sums to the owner.
//
// Pushers read what the senders to the domain read, and write the gather rings of the rails; they
// wait for freed, and signal gathered. Reducers read the gather ring and write the send buffers;
// they wait for gathered and credit, and signal delivered and freed.
#ifndef JAX_EP_CSRC_KERNELS_INTERNODE_RAIL_SUMS_H_
#define JAX_EP_CSRC_KERNELS_INTERNODE_RAIL_SUMS_H_

#include "csrc/device/rail.h"
#include "csrc/kernels/high_throughput/combine_sums.h"
#include "csrc/kernels/internode/message.h"

namespace jax_ep::dev {

// Messages, and the units of sums that they are made of.
struct CombineMessages {
  MessageLayout message;
  MessageLayout unit;
};

// A rail chunk, as a part of the owner's tokens with all segments of their rows.
template <typename Context, typename Transport>
JAX_EP_DEVICE ChunkPart part_of_rail_chunk(const Context& c,
                                           const Rail<Transport>& rail,
                                           i32 chunk) {
  return {.first_token = rail.first_token(chunk),
          .last_token = rail.last_token(chunk),
          .first_segment = 0,
          .last_segment = c.segments.count,
          .has_scalars = true};
}

// `RowLayout` is CombineExpertLayout or CombineRankLayout, of a CombineContext.
template <typename RowLayout, typename Transport>
class CombinePusher {
  using Context = typename RowLayout::Context;

 public:
  JAX_EP_DEVICE CombinePusher(Context& context,
                              const Rail<Transport>& rail,
                              const CombineMessages& layouts)
      : c_(context), rail_(rail), unit_(layouts.unit) {}

  // Those of warps [0, num_warps) that `warp` has: chunk by chunk, then domain by domain.
  JAX_EP_DEVICE void push(i32 warp, i32 num_warps) {
    const i32 ranks = rail_.num_ranks();
    const i32 others = rail_.num_others();
    for (i32 item = warp; item < rail_.num_chunks() * others * ranks; item += num_warps) {
      const i32 turn = item / ranks;
      push_unit(turn / others, turn % others, (item % ranks + rail_.index()) % ranks);
    }
  }

 private:
  JAX_EP_DEVICE void push_unit(i32 chunk, i32 turn, i32 rail) {
    const i32 owner = rail_.rank_at(rail_.domain_at_turn(turn), rail);
    const u64 unit = rail_.unit(turn, chunk);
    if (lane_id() == 0) rail_.wait_freed(rail, unit);
    warp_sync();
    const Ptr<std::byte> sums = rail_.gather_buffer(rail, rail_.index(), unit);
    const ChunkPart part = part_of_rail_chunk(c_, rail_, chunk);
    const TokenSet tokens = tokens_where(part.first_token,
                                         part.last_token,
                                         [this, owner](i64 token) { return holds(owner, token); });
    write_header(sums, tokens);
    const auto position_of = [&tokens, &part](i64 token) {
      return tokens.position(static_cast<i32>(token - part.first_token));
    };
    sum_rows<false>(
        c_,
        part,
        [&](i64 token) {
          const i32 row = row_held_for<RowLayout>(c_, owner, token);
          if (c_.params.op.num_scalars > 0 && warp_ballot(row >= 0) != 0) {
            push_scalars(as<float>(sums + unit_.scalars(tokens.count(), position_of(token))), row);
          }
          return RowLayout(c_).held_terms(row);
        },
        [&](i64 token) { return sums + unit_.row(position_of(token)); });
    rail_.put_gathered(rail, unit);
  }

  // One lane: whether this rank has a row of the token.
  JAX_EP_DEVICE bool holds(i32 owner, i64 token) const {
    const i32 max_rows =
        max_rows_per_token(RowLayout::kLayout, c_.num_topk, c_.shape.num_local_experts());
    const i64 global_token = owner * c_.shape.num_tokens + token;
    for (i32 i = 0; i < max_rows; ++i) {
      const i32 row = ld(Ptr<const i32>{c_.params.op.source_slot} + (global_token * max_rows + i));
      if (row >= 0 && row < c_.shape.recv_capacity) return true;  // as in row_of_lane
    }
    return false;
  }

  // All K are written, because all are read.
  JAX_EP_DEVICE void push_scalars(Ptr<float> to, i32 row) const {
    if (lane_id() < static_cast<u32>(c_.num_topk)) st(to + lane_id(), 0.0F);
    RowLayout(c_).send_scalars(row, [to](u32 position, float scalar) {
      st(to + position, scalar);  // by the lane that has written the 0
    });
  }

  Context& c_;
  const Rail<Transport>& rail_;
  const MessageLayout& unit_;
};

// `Context` is a CombineContext.
template <typename Context, typename Transport>
class CombineReducer {
 public:
  JAX_EP_DEVICE CombineReducer(Context& context,
                               const Rail<Transport>& rail,
                               const CombineMessages& layouts)
      : c_(context), rail_(rail), layouts_(layouts) {}

  // As above.
  JAX_EP_DEVICE void reduce(i32 warp, i32 num_warps) {
    const i32 others = rail_.num_others();
    for (i32 item = warp; item < rail_.num_chunks() * others; item += num_warps) {
      reduce_unit(item / others, item % others);
    }
  }

 private:
  JAX_EP_DEVICE void reduce_unit(i32 chunk, i32 turn) {
    const i32 domain = rail_.domain_at_turn(turn);
    const u64 unit = rail_.unit(turn, chunk);
    rail_.wait_gathered(unit);
    if (lane_id() == 0) rail_.wait_credit(domain, chunk);
    warp_sync();
    // A lane for each rank of the domain.
    const bool is_rank = static_cast<i32>(lane_id()) < rail_.num_ranks();
    const Ptr<const std::byte> gathered{
        rail_.gather_buffer(rail_.index(), is_rank ? static_cast<i32>(lane_id()) : 0, unit).raw};
    const TokenSet tokens_of_lane = is_rank ? read_header(gathered) : TokenSet{0};
    const TokenSet tokens = any_of(tokens_of_lane);
    const Ptr<std::byte> message = rail_.send_buffer(domain, chunk);
    write_header(message, tokens);
    const ChunkPart part = part_of_rail_chunk(c_, rail_, chunk);
    const auto index_of = [&part](i64 token) { return static_cast<i32>(token - part.first_token); };
    sum_rows<false>(
        c_,
        part,
        [&](i64 token) {
          const i32 i = index_of(token);
          const u32 holders = possible_holders(warp_ballot(tokens_of_lane.has(i)));
          if (c_.params.op.num_scalars > 0 && holders != 0) {
            merge_scalars(message, tokens, i, gathered, tokens_of_lane, holders);
          }
          return terms_of(gathered + layouts_.unit.row(tokens_of_lane.position(i)), holders);
        },
        [&](i64 token) {
          const Ptr<std::byte> at =
              message + layouts_.message.row(tokens.position(index_of(token)));
          if (!c_.bulk) clear_part(at, layouts_.message.row_bytes);
          return at;
        });
    rail_.send(domain, chunk, layouts_.message.bytes(tokens.count()));
    rail_.put_freed(unit);
  }

  // A token has at most K holders, and a message has room for no more: handles from elsewhere may
  // say otherwise.
  JAX_EP_DEVICE u32 possible_holders(u32 holders) const {
    while (count_bits(holders) > static_cast<u32>(c_.num_topk)) holders &= holders - 1;
    return holders;
  }

  // All lanes: the tokens that any has.
  JAX_EP_DEVICE TokenSet any_of(const TokenSet& tokens_of_lane) const {
    u64 bits = 0;
    for (i32 rank = 0; rank < rail_.num_ranks(); ++rank) {
      const auto lane = static_cast<u32>(rank);
      bits |= u64{warp_shfl(static_cast<u32>(tokens_of_lane.bits), lane)} |
              u64{warp_shfl(static_cast<u32>(tokens_of_lane.bits >> 32), lane)} << 32;
    }
    return {bits};
  }

  // All lanes, each with its rank's row: those of the ranks that hold the token, ascending.
  JAX_EP_DEVICE SumTerms terms_of(Ptr<const std::byte> row, u32 holders) const {
    const bool holds = (holders >> lane_id() & 1) != 0;
    const auto position = static_cast<i32>(count_bits(holders & lanes_below(lane_id())));
    const i32 from = lane_with_position(holds ? position : -1, rail_.num_ranks());
    SumTerms terms{};
    terms.set(static_cast<i32>(count_bits(holders)), 1);
    terms.row = shfl_pointer(row, from < 0 ? 0 : from);
    terms.weight = 1.0F;
    return terms;
  }

  // K scalars of each rank that holds the token, one rank after the other.
  JAX_EP_DEVICE void merge_scalars(Ptr<std::byte> message,
                                   const TokenSet& tokens,
                                   i32 i,
                                   Ptr<const std::byte> gathered,
                                   const TokenSet& tokens_of_lane,
                                   u32 holders) const {
    const Ptr<std::byte> at =
        message + layouts_.message.scalars(tokens.count(), tokens.position(i));
    clear_part(at, layouts_.message.scalar_stride);
    const TokenScalars merged(at, c_.num_topk);
    if (lane_id() == 0) merged.write_holders(holders);
    const Ptr<const std::byte> of_lane =
        gathered + layouts_.unit.scalars(tokens_of_lane.count(), tokens_of_lane.position(i));
    for (u32 left = holders; left != 0; left &= left - 1) {
      const auto rank = static_cast<i32>(lowest_bit(left));
      const Ptr<const float> from = as<const float>(shfl_pointer(of_lane, rank));
      if (lane_id() >= static_cast<u32>(c_.num_topk)) continue;
      st(merged.of(holders, rank) + lane_id(), ld(from + lane_id()));
    }
  }

  Context& c_;
  const Rail<Transport>& rail_;
  const CombineMessages& layouts_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_INTERNODE_RAIL_SUMS_H_
