// SPDX-License-Identifier: Apache-2.0
// The protocol of an exchange among the ranks of a group; docs/protocol.md explains it.
//
// Exchange e of a group is its e-th plan, dispatch or combine, counted on every rank in device
// memory, so that a captured graph can be replayed. An arrival flag also holds the operation,
// so that ranks that run different ones notice. What a rank sends in exchange e it may
// overwrite in exchange e + 1, once the receiver has acknowledged e. Flags only grow; nothing is
// reset.
#ifndef JAX_EP_CSRC_DEVICE_EXCHANGE_H_
#define JAX_EP_CSRC_DEVICE_EXCHANGE_H_

#include "csrc/device/wait.h"

namespace jax_ep::dev {

class Exchange {
 public:
  // All threads, first thing in the kernel.
  JAX_EP_DEVICE Exchange(const RankView& view, OpKind op, const i32* program_rank)
      : view_(view), op_(op), epoch_(ld(control(view, Control::kEpoch)) + 1) {
    // By every thread: none stores to a peer as another rank.
    const i32 rank = ld(Ptr<const i32>{program_rank});
    if (rank == view.rank) return;
    give_up(view, {WaitTag::kWrongRank, op, rank, 0}, 0, 0);
  }

  JAX_EP_DEVICE const RankView& view() const { return view_; }

  // All lanes of a warp, before it first stores to a peer: until all peers have read what this
  // rank sent in the exchange before.
  JAX_EP_DEVICE void wait_until_writable() const {
    for (i32 peer = static_cast<i32>(lane_id()); peer < view_.num_ranks; peer += kWarpSize) {
      // ACQUIRE(acknowledged): the peer's reads come before this warp's stores.
      wait_until_reached<Scope::kSys>(view_,
                                      acknowledged(view_, view_.rank, peer),
                                      epoch_ - 1,
                                      {WaitTag::kAcknowledged, op_, peer, 0},
                                      "acknowledged");
    }
    warp_sync();
  }

  // All lanes of a warp, after its last store of a chunk to any peer; every lane has waited for
  // its own bulk stores.
  JAX_EP_DEVICE void signal_arrived(i32 flag) const {
    warp_sync();
    for (i32 peer = static_cast<i32>(lane_id()); peer < view_.num_ranks; peer += kWarpSize) {
      // RELEASE(arrived): publishes the warp's rows, scalars or routing of the chunk
      // (ordered by the warp_sync above).
      st_release<Scope::kSys>(arrived(view_, peer, view_.rank, flag), arrival_flag(epoch_, op_));
    }
  }
  // The same for a chunk that goes to one peer alone.
  JAX_EP_DEVICE void signal_arrived_at(i32 peer, i32 flag) const {
    warp_sync();
    // RELEASE(arrived): as above.
    if (lane_id() == 0)
      st_release<Scope::kSys>(arrived(view_, peer, view_.rank, flag), arrival_flag(epoch_, op_));
  }

  // One lane; follow it with a warp_sync.
  JAX_EP_DEVICE void wait_arrived(i32 source, i32 flag) const {
    const WaitSite site = {WaitTag::kArrived, op_, source, static_cast<u32>(flag)};
    // ACQUIRE(arrived): what the source stored of the chunk can be read. The flag may be very old,
    // because small batches don't use it; it is never ahead, because the source needs our
    // acknowledgment first. So only this exchange's flags end the wait.
    const u32 seen = wait_until_in<Scope::kSys>(view_,
                                                arrived(view_, view_.rank, source, flag),
                                                arrival_flag(epoch_, OpKind::kPlan),
                                                arrival_flag(epoch_, OpKind::kCombine),
                                                site,
                                                "arrived");
    if (seen == arrival_flag(epoch_, op_)) return;
    give_up(view_, {WaitTag::kWrongOp, op_, source, site.chunk}, arrival_flag(epoch_, op_), seen);
  }

  // All threads: returns when every block of the kernel has come.
  JAX_EP_DEVICE void grid_barrier() const {
    block_sync();
    if (thread_id() == 0 && num_blocks() > 1) {
      const Ptr<u32> count = control(view_, Control::kBarrierCount);
      const Ptr<u32> generation = control(view_, Control::kBarrierGeneration);
      const u32 next = ld_relaxed<Scope::kGpu>(generation) + 1;
      // RELEASE(grid): what this block stored. ACQUIRE(grid) by the last block, which passes all
      // of it on with the generation.
      if (fetch_add_acq_rel<Scope::kGpu>(count, 1) + 1 == num_blocks()) {
        st_relaxed<Scope::kGpu>(count, 0);
        st_release<Scope::kGpu>(generation, next);
      } else {
        wait_until_reached<Scope::kGpu>(
            view_, generation, next, {WaitTag::kGridBarrier, op_, view_.rank, 0}, "grid barrier");
      }
    }
    block_sync();
  }

  // All threads, last thing in the kernel; every thread has waited for its own bulk copies.
  JAX_EP_DEVICE void finish() const {
    block_sync();
    if (warp_id() != 0) return;
    u32 blocks_before = 0;
    if (lane_id() == 0) {
      // RELEASE(blocks_done): this block's reads of staged data, and of the epoch.
      // ACQUIRE(blocks_done) by the last block.
      blocks_before = fetch_add_acq_rel<Scope::kGpu>(control(view_, Control::kBlocksDone), 1);
    }
    blocks_before = warp_shfl(blocks_before, 0);
    if (blocks_before + 1 != num_blocks()) return;
    warp_sync();
    for (i32 peer = static_cast<i32>(lane_id()); peer < view_.num_ranks; peer += kWarpSize) {
      // RELEASE(acknowledged): this rank has read all that the peer sent; the peer may overwrite.
      st_release<Scope::kSys>(acknowledged(view_, peer, view_.rank), epoch_);
    }
    if (lane_id() == 0) {
      st(control(view_, Control::kBlocksDone), 0);
      st(control(view_, Control::kEpoch), epoch_);
    }
  }

 private:
  const RankView& view_;
  const OpKind op_;
  const u32 epoch_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_DEVICE_EXCHANGE_H_
