// SPDX-License-Identifier: Apache-2.0
// The receivers of a combine: they sum what the ranks have sent for this rank's tokens.
//
// They read this rank's staging, topk_idx, slot, and of its own tokens what the senders read. They
// write out and token_scalars. They wait for arrived.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_RECEIVER_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_RECEIVER_H_

#include "csrc/kernels/high_throughput/combine_sums.h"

namespace jax_ep::dev {

// What has arrived for a token of this rank, where all ranks are peers: a row of each other rank
// that holds it, in this rank's staging. `Context` is a CombineContext.
template <typename Context>
class StagedSums {
 public:
  JAX_EP_DEVICE explicit StagedSums(const Context& context) : c_(context) {}

  // All lanes: whether this lane stands for a row that has arrived, which `row` has for the rank of
  // its selection. A rank, or a domain that has summed, has one lane.
  JAX_EP_DEVICE bool is_term(const Selections& selections, i64 /*token*/) const {
    return selections.leads() && selections.dest() != c_.rank;
  }
  JAX_EP_DEVICE Ptr<const std::byte> row(i32 source, i64 token) const {
    return {staged_row(c_.exchange.view(), c_.rank, source, token).raw};
  }
  // The scalar that a rank has sent at a position.
  JAX_EP_DEVICE float scalar(i32 source, i64 token, u32 position) const {
    return ld(staged_scalars(c_.exchange.view(), c_.rank, source, token, c_.num_topk) + position);
  }

 private:
  const Context& c_;
};

// `RowLayout` is CombineExpertLayout or CombineRankLayout, of a CombineContext.
template <typename RowLayout, typename Arrivals = StagedSums<typename RowLayout::Context>>
class CombineReceiver {
  using Context = typename RowLayout::Context;
  using RowType = typename Context::RowType;

 public:
  JAX_EP_DEVICE explicit CombineReceiver(Context& context)
      : CombineReceiver(context, Arrivals(context)) {}
  JAX_EP_DEVICE CombineReceiver(Context& context, const Arrivals& arrivals)
      : c_(context), arrivals_(arrivals) {}

  JAX_EP_DEVICE void receive() {
    for (WorkQueue work = c_.exchange.receiving(c_.parts.count(), c_.num_senders); work.has_item();
         work.next()) {
      const i32 flag_idx = work.item();
      share_out_peers(c_.exchange.view(), [this, flag_idx](i32 source) {
        if (source != c_.rank) c_.exchange.wait_arrived(source, flag_idx);
      });
      warp_sync();
      sum(c_.parts.at(flag_idx));
    }
  }

  // Sums a part of a chunk, of which all has arrived.
  JAX_EP_DEVICE void sum(const ChunkPart& part) {
    const bool is_first = part.has_scalars;
    sum_rows<true>(
        c_,
        part,
        [this, is_first](i64 token) {
          const Selections selections(c_.shape,
                                      Ptr<const i32>{c_.params.op.topk_idx},
                                      Ptr<const i32>{c_.params.op.slot},
                                      token);
          if (is_first) receive_scalars(selections, token);
          const SumTerms terms = received_terms(selections, token);
          if (terms.count() == 0 && is_first) clear_row(token);
          return terms;
        },
        [this](i64 token) { return c_.out_row(token); });
  }

 private:
  JAX_EP_DEVICE RowLayout layout() const { return RowLayout(c_); }

  // This rank's own rows, and what has arrived from others, ascending.
  JAX_EP_DEVICE SumTerms received_terms(const Selections& selections, i64 token) const {
    const bool leads = arrivals_.is_term(selections, token);
    const u32 others = warp_ballot(leads);
    SumTerms terms = layout().held_terms(row_held_for<RowLayout>(c_, c_.rank, token));
    // Of a plan's there are at most num_topk in all. Those of a handle from elsewhere fit too.
    const i32 lanes = static_cast<i32>(kWarpSize - count_bits(others));
    terms.set(terms.own() < lanes ? terms.own() : lanes,
              terms.weights_per_row(),
              static_cast<i32>(count_bits(others)),
              static_cast<i32>(count_bits(warp_ballot(leads && selections.dest() < c_.rank))));
    i32 position = terms.own();
    JAX_EP_NO_UNROLL
    for (i32 k = 0; k < c_.num_topk; ++k) {
      const auto other =
          static_cast<i32>(warp_shfl(static_cast<u32>(selections.dest()), static_cast<u32>(k)));
      position += static_cast<i32>((others >> k & 1) != 0 && other < selections.dest());
    }
    const i32 from = lane_with_position(leads ? position : -1, c_.num_topk);
    const auto source = static_cast<i32>(
        warp_shfl(static_cast<u32>(selections.dest()), static_cast<u32>(from < 0 ? 0 : from)));
    terms.domain = c_.domain_of(source);
    if (from >= 0) terms.row = arrivals_.row(source, token);
    return terms;
  }

  // The sum of a token that nobody holds.
  JAX_EP_DEVICE void clear_row(i64 token) const {
    c_.bulk ? clear<Vec16>(c_.out_row(token), c_.row_bytes)
            : clear<typename RowType::Element>(c_.out_row(token), c_.row_bytes);
  }

  JAX_EP_DEVICE void receive_scalars(const Selections& selections, i64 token) {
    if (c_.params.op.num_scalars == 0) return;
    const u32 lane = lane_id();
    const u32 position = layout().scalar_position(selections);
    if (lane >= static_cast<u32>(c_.num_topk)) return;
    float scalar = 0.0F;
    if (selections.live() && selections.dest() == c_.rank) {
      scalar = c_.row_scalar(layout().own_scalar_at(selections));
    } else if (selections.live()) {
      scalar = arrivals_.scalar(selections.dest(), token, position);
    }
    st(Ptr<float>{c_.params.op.token_scalars} + (token * c_.num_topk + lane), scalar);
  }

  Context& c_;
  const Arrivals arrivals_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_RECEIVER_H_
