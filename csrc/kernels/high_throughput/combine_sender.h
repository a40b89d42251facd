// SPDX-License-Identifier: Apache-2.0
// The senders of a combine: they sum what this rank holds of its peers' tokens, and send one row
// for each token to its owner.
//
// They read y, weights, row_scalars, row_topk_idx and source_slot, and write the owners' staging.
// They wait for acknowledged, and signal arrived.
#ifndef JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_SENDER_H_
#define JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_SENDER_H_

#include "csrc/kernels/high_throughput/combine_sums.h"

namespace jax_ep::dev {

// `RowLayout` is CombineExpertLayout or CombineRankLayout, of a CombineContext.
template <typename RowLayout>
class CombineSender {
  using Context = typename RowLayout::Context;

 public:
  JAX_EP_DEVICE explicit CombineSender(Context& context) : c_(context) {}

  JAX_EP_DEVICE void send() {
    const i32 num_others = c_.exchange.view().num_neighbors - 1;
    WorkQueue work = c_.exchange.sending(c_.parts.count() * num_others, c_.num_senders);
    if (!work.has_item()) return;
    c_.exchange.wait_until_writable();
    // Chunk by chunk; each rank begins with another owner.
    for (; work.has_item(); work.next()) {
      const i32 flag_idx = work.item() / num_others;
      const i32 owner = peer_at_turn(c_.exchange.view(), 1 + work.item() % num_others);
      if (owner < 0) continue;
      const ChunkPart part = c_.parts.at(flag_idx);
      const bool sends_scalars = part.has_scalars && c_.params.op.num_scalars != 0;
      sum_rows<false>(
          c_,
          part,
          [this, owner, sends_scalars](i64 token) {
            const i32 row = row_held_for<RowLayout>(c_, owner, token);
            if (sends_scalars) send_scalars(owner, token, row);
            return layout().held_terms(row);
          },
          [this, owner](i64 token) { return peer_row(c_.exchange.view(), owner, token); });
      c_.exchange.signal_arrived_at(owner, flag_idx);
    }
  }

 private:
  JAX_EP_DEVICE RowLayout layout() const { return RowLayout(c_); }
  JAX_EP_DEVICE void send_scalars(i32 owner, i64 token, i32 row) const {
    layout().send_scalars(row, [this, owner, token](u32 position, float scalar) {
      put_scalar(c_.exchange.view(), owner, token, c_.num_topk, position, scalar);
    });
  }

  Context& c_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_HIGH_THROUGHPUT_COMBINE_SENDER_H_
