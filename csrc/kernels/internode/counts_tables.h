// SPDX-License-Identifier: Apache-2.0
// The tables of a plan by counts, in the network heaps of the domain. counts_plan_kernel.h says who
// writes them when.
#ifndef JAX_EP_CSRC_KERNELS_INTERNODE_COUNTS_TABLES_H_
#define JAX_EP_CSRC_KERNELS_INTERNODE_COUNTS_TABLES_H_

#include "csrc/core/counts_plan.h"
#include "csrc/device/rail.h"

namespace jax_ep::dev {

class CountsTables {
 public:
  JAX_EP_DEVICE CountsTables(const RankView& view, const NetworkView& network, const EpShape& shape)
      : network_(network),
        index_(network.topology.index_in_domain(view.rank)),
        bins_(num_bins(shape.layout, shape.num_experts, shape.num_ranks)),
        num_local_(shape.num_local_experts()),
        tiles_(jax_ep::num_tiles(shape.num_tokens, 1)) {}

  // Of this rank's tokens.
  JAX_EP_DEVICE i32 num_tiles() const { return tiles_; }
  JAX_EP_DEVICE Ptr<u32> tile_count(i32 bin, i32 tile) const {
    return own(NetworkRegion::kTileCounts) + (i64{bin} * tiles_ + tile);
  }

  // What the ranks of the domain read of each other; `index` says of which.
  JAX_EP_DEVICE Ptr<u32> rank_counts(i32 index) const {
    return network_region<u32>(network_, index, NetworkRegion::kRankCounts);
  }
  JAX_EP_DEVICE Ptr<u32> runs(i32 index) const {
    return network_region<u32>(network_, index, NetworkRegion::kRuns);
  }
  JAX_EP_DEVICE Ptr<u32> own_counts() const { return rank_counts(index_); }
  JAX_EP_DEVICE Ptr<u32> own_runs() const { return runs(index_); }

  JAX_EP_DEVICE Ptr<u32> counts_of(i32 source) const {
    return own(NetworkRegion::kAllCounts) + i64{source} * bins_;
  }
  // [L + 1], in entries, of the runs that the source sends to this domain; of those of a rank of
  // the domain, which sends none, in its kRuns.
  JAX_EP_DEVICE Ptr<u32> places(i32 source) const {
    return own(NetworkRegion::kRunPlaces) + i64{source} * (num_local_ + 1);
  }
  // [E + 1], in entries.
  JAX_EP_DEVICE Ptr<u32> starts() const { return own(NetworkRegion::kRunStarts); }

 private:
  JAX_EP_DEVICE Ptr<u32> own(NetworkRegion which) const {
    return network_region<u32>(network_, index_, which);
  }

  const NetworkView& network_;
  const i32 index_;
  const i32 bins_;
  const i32 num_local_;
  const i32 tiles_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_INTERNODE_COUNTS_TABLES_H_
