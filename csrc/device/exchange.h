// SPDX-License-Identifier: Apache-2.0
// The protocol of an exchange among the ranks of a group; docs/design/protocol.md explains it.
//
// Exchange e of a channel is its e-th plan, dispatch, plan with its dispatch, or combine, counted
// on every rank in device memory, so that a captured graph can be replayed. An arrival flag also
// holds the operation and which call it is, so that ranks that run different ones notice. What a
// rank sends in exchange e it may overwrite in exchange e + 1, once the receiver has acknowledged
// e. Flags only grow; nothing is reset.
#ifndef JAX_EP_CSRC_DEVICE_EXCHANGE_H_
#define JAX_EP_CSRC_DEVICE_EXCHANGE_H_

#include "csrc/device/wait.h"
#include "csrc/device/work_queue.h"

namespace jax_ep::dev {

JAX_EP_DEVICE u32 next_epoch(const RankView& view, Channel channel) {
  return ld(control(view, channel, ChannelControl::kEpoch)) + 1;
}

class Exchange {
 public:
  // All threads, first thing in the kernel.
  JAX_EP_DEVICE Exchange(const RankView& view,
                         const CallBlocks& blocks,
                         Channel channel,
                         OpKind op,
                         u32 call_tag,
                         const i32* program_rank,
                         u32 epoch)
      : view_(view),
        blocks_(blocks),
        channel_(channel),
        op_(op),
        call_tag_(call_tag),
        closed_(ld(control(view, Control::kClosed)) != 0),
        epoch_(epoch) {
    if (closed_) return;
    // By every thread: none stores to a peer as another rank.
    const i32 rank = ld(Ptr<const i32>{program_rank});
    if (rank != view.rank) give_up(view, {WaitTag::kWrongRank, op, rank, epoch_, 0}, 0);
    // Both by a warp that is not the first to send.
    if (block_of_call() == 0 && thread_id() + 1 == num_threads()) check_alone();
    if (block_of_call() == 0 && warp_id() + 1 == num_threads() / kWarpSize) acknowledge_before();
  }

  // Whether this rank takes part. If it does not, the kernel touches no peer's heap, and leaves
  // empty results.
  JAX_EP_DEVICE bool takes_part() const { return is_active(view_, view_.rank); }

  // Whether the group has been closed. Then the kernel must touch no heap, and leave no result that
  // could be taken for one: see `poison`.
  JAX_EP_DEVICE bool closed() const { return closed_; }
  // All threads of a closed group's main blocks: fills results with ones, which are -1 or NaN.
  template <typename T>
  JAX_EP_DEVICE void poison(T* results, i64 count) const {
    fill(Ptr<T>{results}, count, static_cast<T>(~T{0}));
  }
  template <typename T>
  JAX_EP_DEVICE void fill(Ptr<T> results, i64 count, T value) const {
    const i64 num_workers = i64{num_main()} * num_threads();
    for (i64 i = i64{block_of_call()} * num_threads() + thread_id(); i < count; i += num_workers) {
      st(results + i, value);
    }
  }
  // All threads of a closed group's main blocks, last thing: tells the host.
  JAX_EP_DEVICE void report_closed() const {
    if (block_of_call() != 0 || thread_id() != 0) return;
    write_record(view_, {WaitTag::kClosed, op_, view_.rank, epoch_, 0}, 0, 0, 0);
  }

  // The same exchange, for what has its flags from `first_flag` on.
  JAX_EP_DEVICE Exchange with_flags_from(i32 first_flag) const {
    Exchange other = *this;
    other.first_flag_ = first_flag;
    return other;
  }

  JAX_EP_DEVICE const RankView& view() const { return view_; }
  JAX_EP_DEVICE OpKind op() const { return op_; }
  JAX_EP_DEVICE u32 epoch() const { return epoch_; }
  JAX_EP_DEVICE u32 call_tag() const { return call_tag_; }

  JAX_EP_DEVICE u32 num_main() const { return static_cast<u32>(blocks_.num_main); }
  JAX_EP_DEVICE bool has_tail() const { return blocks_.num_tail > 0; }
  // Whether this block is of the call's tail.
  JAX_EP_DEVICE bool in_tail() const { return block_of_call() >= num_main(); }

  // The work of the first `num_senders` warps of a main block, which send; all have a position.
  JAX_EP_DEVICE WorkQueue sending(i32 num_items, u32 num_senders) const {
    const auto position = static_cast<i32>(block_of_call() * num_senders + warp_id());
    const auto num_positions = static_cast<i32>(num_main() * num_senders);
    return {
        control(view_, channel_, ChannelControl::kSendTickets), num_items, num_positions, position};
  }
  // The work of all warps. Those that also send come when they have sent, those of the tail when
  // all have; the others have a position, neighboring ones in different blocks.
  JAX_EP_DEVICE WorkQueue receiving(i32 num_items, u32 num_senders) const {
    const u32 num_warps = num_threads() / kWarpSize;
    const bool comes_later = in_tail() || warp_id() < num_senders;
    const i32 position =
        comes_later ? -1
                    : static_cast<i32>((warp_id() - num_senders) * num_main() + block_of_call());
    const auto num_positions = static_cast<i32>((num_warps - num_senders) * num_main());
    return {control(view_, channel_, ChannelControl::kReceiveTickets),
            num_items,
            num_positions,
            position};
  }

  // The same where roles differ from block to block: no warp has a position.
  JAX_EP_DEVICE WorkQueue receiving_by_tickets(i32 num_items) const {
    return {control(view_, channel_, ChannelControl::kReceiveTickets), num_items, 0, -1};
  }

  // All lanes of a warp, before it first stores to a peer: until all peers have read what this
  // rank sent in the exchange before.
  JAX_EP_DEVICE void wait_until_writable() const {
    share_out_peers(view_, [this](i32 peer) {
      // ACQUIRE(acknowledged): the peer's reads come before this warp's stores.
      wait_until_reached<Scope::kSys>(view_,
                                      acknowledged(view_, channel_, view_.rank, peer),
                                      {WaitTag::kAcknowledged, op_, peer, epoch_ - 1, 0},
                                      "acknowledged");
    });
    warp_sync();
  }

  // All lanes of a warp, after its last store of a chunk to any peer; every lane has waited for
  // its own bulk stores.
  JAX_EP_DEVICE void signal_arrived(i32 flag_idx) const {
    warp_sync();
    share_out_peers(view_, [this, flag_idx](i32 peer) {
      put_arrived(view_, channel_, peer, first_flag_ + flag_idx, own_flag());
    });
  }
  // The same for a chunk that goes to one peer alone.
  JAX_EP_DEVICE void signal_arrived_at(i32 peer, i32 flag_idx) const {
    warp_sync();
    if (lane_id() == 0) put_arrived(view_, channel_, peer, first_flag_ + flag_idx, own_flag());
  }

  // All lanes of each warp that sends, when it has announced its last chunk. The last of them tells
  // the peers.
  JAX_EP_DEVICE void count_sent(u32 num_senders) const {
    u32 warps_before = 0;
    if (lane_id() == 0) {
      warps_before =
          fetch_add_relaxed<Scope::kGpu>(control(view_, channel_, ChannelControl::kSendersDone), 1);
    }
    if (warp_shfl(warps_before, 0) + 1 != num_main() * num_senders) return;
    share_out_peers(view_, [this](i32 peer) { put_sent(view_, channel_, peer, epoch_); });
  }
  // All lanes of a warp: whether all peers have said so. What they sent is yet to be waited for.
  JAX_EP_DEVICE bool all_sent() const {
    bool sent_all = true;
    share_out_peers(view_, [this, &sent_all](i32 peer) {
      const u32 seen = ld_relaxed<Scope::kSys>(sent(view_, channel_, view_.rank, peer));
      sent_all = sent_all && seen == epoch_;
    });
    return warp_ballot(!sent_all) == 0;
  }

  JAX_EP_DEVICE Channel channel() const { return channel_; }
  JAX_EP_DEVICE u64 own_flag() const { return arrival_flag(epoch_, op_, call_tag_); }
  // `seen` is of this exchange, and not `own`: the source is in it with another operation, or in
  // another call of this one.
  [[noreturn]] JAX_EP_COLD static void give_up_with_other(
      const RankView& view, OpKind op, i32 source, u32 chunk, u32 epoch, u64 own, u64 seen) {
    if (op_of(seen) != static_cast<u32>(op)) {
      const WaitContext context = {WaitTag::kWrongOp, op, source, epoch, chunk};
      give_up(view, context, epoch_of(seen), op_of(seen));
    }
    u32 differs = 0;
    for (u32 part = 0; part < kNumCallParts; ++part) {
      const u32 bits = (tag_of(seen) ^ tag_of(own)) >> (8 * part) & 0xFF;
      differs |= static_cast<u32>(bits != 0) << part;
    }
    const WaitContext context = {WaitTag::kWrongCall, op, source, epoch, chunk};
    give_up(view, context, epoch_of(seen), 0, differs);
  }

  // One lane; follow it with a warp_sync.
  JAX_EP_DEVICE void wait_arrived(i32 source, i32 flag_idx) const {
    const auto flag = static_cast<u32>(first_flag_ + flag_idx);
    const WaitContext context = {WaitTag::kArrived, op_, source, epoch_, flag};
    const u32 epoch = epoch_;
    // ACQUIRE(arrived): what the source stored of the chunk can be read. The flag may be very old,
    // because small batches don't use it; it is never ahead, because the source needs our
    // acknowledgment first. So only this exchange's flags end the wait.
    const u64 seen = wait_until<Scope::kSys>(
        view_,
        arrived(view_, channel_, view_.rank, source, first_flag_ + flag_idx),
        [epoch](u64 word) { return word != 0 && epoch_of(word) == epoch; },
        context,
        "arrived");
    if (seen != own_flag()) {
      give_up_with_other(view_, op_, source, flag, epoch_, own_flag(), seen);
    }
  }

  // All threads of `warps` (see block_warps.h), the same ones of each main block: returns when
  // those of every main block have come.
  template <typename Warps>
  JAX_EP_DEVICE void grid_barrier(const Warps& warps) const {
    warps.sync();
    if (warps.thread() == 0 && num_main() > 1) {
      const Ptr<u32> count = control(view_, channel_, ChannelControl::kBarrierCount);
      const Ptr<u32> generation = control(view_, channel_, ChannelControl::kBarrierGeneration);
      const u32 next = ld_relaxed<Scope::kGpu>(generation) + 1;
      // RELEASE(grid): what this block stored. ACQUIRE(grid) by the last block, which passes all
      // of it on with the generation.
      if (fetch_add_acq_rel<Scope::kGpu>(count, 1) + 1 == num_main()) {
        st_relaxed<Scope::kGpu>(count, 0);
        st_release<Scope::kGpu>(generation, next);
      } else {
        wait_until_reached<Scope::kGpu>(
            view_, generation, {WaitTag::kGridBarrier, op_, view_.rank, next, 0}, "grid barrier");
      }
    }
    warps.sync();
  }

  // All threads of `warps`, once they have made their block's part of the plan.
  template <typename Warps>
  JAX_EP_DEVICE void announce_plan(const Warps& warps) const {
    warps.sync();
    if (warps.thread() != 0) return;
    const Ptr<u32> count = control(view_, channel_, ChannelControl::kBarrierCount);
    // RELEASE(planned): what this block stored of the plan. ACQUIRE(planned) by the last block,
    // which passes all of it on.
    if (fetch_add_acq_rel<Scope::kGpu>(count, 1) + 1 != num_main()) return;
    st_relaxed<Scope::kGpu>(count, 0);
    st_release<Scope::kGpu>(control(view_, channel_, ChannelControl::kPlanned), 1);
  }
  // All lanes of a warp, before it first reads of the plan.
  JAX_EP_DEVICE void wait_planned() const {
    if (lane_id() == 0) {
      // ACQUIRE(planned): the plan of all blocks can be read.
      (void)wait_until<Scope::kGpu>(
          view_,
          control(view_, channel_, ChannelControl::kPlanned),
          [](u32 word) { return word != 0; },
          {WaitTag::kPlanned, op_, view_.rank, epoch_, 0},
          "planned");
    }
    warp_sync();
  }

  // All threads of all blocks, last thing in the kernel; every thread has waited for its own
  // copies. The exchange counts also for a rank that takes no part, but it tells nobody.
  JAX_EP_DEVICE void finish() const {
    finish([this] {
      if (takes_part()) acknowledge();
    });
  }
  // All lanes of a warp, when all blocks have come: the peers may overwrite what they sent.
  JAX_EP_DEVICE void acknowledge() const {
    share_out_peers(view_, [this](i32 peer) { put_acknowledged(view_, channel_, peer, epoch_); });
  }
  // The same; what a warp does when all blocks have come is `close_up()`. `begins`: the kernel is
  // the one that began the exchange, and not its second half.
  template <typename CloseUp>
  JAX_EP_DEVICE void finish(const CloseUp& close_up, bool begins = true) const {
    if (is_last_warp()) close(close_up, begins);
  }
  // The two parts of it. True in all lanes of the one warp that closes the exchange.
  JAX_EP_DEVICE bool is_last_warp() const {
    block_sync();
    if (warp_id() != 0) return false;
    u32 blocks_before = 0;
    if (lane_id() == 0) {
      // RELEASE(blocks_done): this block's reads of staged data, and of the epoch.
      // ACQUIRE(blocks_done) by the last block.
      blocks_before =
          fetch_add_acq_rel<Scope::kGpu>(control(view_, channel_, ChannelControl::kBlocksDone), 1);
    }
    blocks_before = warp_shfl(blocks_before, 0);
    if (blocks_before + 1 != num_main() + static_cast<u32>(blocks_.num_tail)) return false;
    warp_sync();
    return true;
  }
  template <typename CloseUp>
  JAX_EP_DEVICE void close(const CloseUp& close_up, bool begins = true) const {
    close_up();
    if (lane_id() != 0) return;
    // Two kernels that overlap by less than the first one's look at kRunning.
    if (begins && next_epoch(view_, channel_) != epoch_) give_up_overlapping(kMaxOps);
    st(control(view_, channel_, ChannelControl::kBlocksDone), 0);
    st(control(view_, channel_, ChannelControl::kSendersDone), 0);
    st(control(view_, channel_, ChannelControl::kSendTickets), 0);
    st(control(view_, channel_, ChannelControl::kReceiveTickets), 0);
    st(control(view_, channel_, ChannelControl::kUnacknowledged), all_active(view_) ? 0 : 1);
    if (op_ == OpKind::kPlanDispatch) st(control(view_, channel_, ChannelControl::kPlanned), 0);
    if (begins) st(control(view_, channel_, ChannelControl::kEpoch), epoch_);
    st(control(view_, channel_, ChannelControl::kRunning), 0);
  }

 private:
  JAX_EP_DEVICE u32 block_of_call() const { return static_cast<u32>(blocks_.first) + block_id(); }

  // All lanes of one warp. The exchange before was acknowledged to the ranks that took part in it,
  // and by none that did not: those that do now wait for it. This rank has ended it, so that nobody
  // waits for who waits.
  JAX_EP_DEVICE void acknowledge_before() const {
    if (channel_ != Channel::kHighThroughput || !takes_part()) return;
    if (ld(control(view_, channel_, ChannelControl::kUnacknowledged)) == 0) return;
    share_out_peers(view_,
                    [this](i32 peer) { put_acknowledged(view_, channel_, peer, epoch_ - 1); });
  }

  // One thread. kRunning holds kUnit + op for each kernel that runs: 0 before this one, or two
  // operations of the group run at the same time, in the same exchange.
  JAX_EP_DEVICE void check_alone() const {
    constexpr u32 kUnit = kMaxOps + 1;
    const u32 running = fetch_add_acq_rel<Scope::kGpu>(
        control(view_, channel_, ChannelControl::kRunning), kUnit + static_cast<u32>(op_));
    if (running != 0) give_up_overlapping(running % kUnit);
  }
  [[noreturn]] JAX_EP_DEVICE void give_up_overlapping(u32 other_op) const {
    give_up(view_, {WaitTag::kOverlap, op_, view_.rank, epoch_, 0}, 0, other_op, 0);
  }

  const RankView& view_;
  const CallBlocks& blocks_;
  const Channel channel_;
  const OpKind op_;
  const u32 call_tag_;
  const bool closed_;
  const u32 epoch_;
  i32 first_flag_ = 0;
};

// The high-throughput exchange of a kernel's operation. All threads, first thing in the kernel.
template <typename Op>
JAX_EP_DEVICE Exchange exchange_of(const KernelParams<Op>& params) {
  constexpr Channel kChannel = Channel::kHighThroughput;
  return {params.view,
          params.blocks,
          kChannel,
          Op::kKind,
          params.call_tag,
          params.program_rank,
          next_epoch(params.view, kChannel)};
}

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_EXCHANGE_H_
