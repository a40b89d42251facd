// SPDX-License-Identifier: Apache-2.0
// What a plan by counts exchanges (counts_exchange.h): first how many selections each rank has per
// bin, then the runs of its selections, from which the rank that they go to learns what its rows
// hold.
#ifndef JAX_EP_CSRC_KERNELS_INTERNODE_COUNTS_CONTENTS_H_
#define JAX_EP_CSRC_KERNELS_INTERNODE_COUNTS_CONTENTS_H_

#include "csrc/kernels/high_throughput/plan_context.h"
#include "csrc/kernels/internode/counts_exchange.h"

namespace jax_ep::dev {

// All counts go to all ranks.
class CountsContent {
 public:
  JAX_EP_DEVICE CountsContent(i32 bins, const CountsTables& tables)
      : bins_(bins), tables_(tables) {}

  JAX_EP_DEVICE WordRange sent_to(i32 /*domain*/) const { return {0, bins_}; }
  JAX_EP_DEVICE WordRange read_of(i32 /*source*/) const { return {0, bins_}; }
  JAX_EP_DEVICE Ptr<const u32> words(i32 index) const {
    return as<const u32>(tables_.rank_counts(index));
  }
  JAX_EP_DEVICE void read(i32 source, Ptr<const u32> from, const WordRange& range) const {
    copy_words(tables_.counts_of(source) + range.first, from + range.first, range.count());
  }

 private:
  const i32 bins_;
  const CountsTables& tables_;
};

// The runs of a domain's experts go there; each rank reads those of its own, and writes what its
// rows hold. `RowLayout` is PlanExpertLayout or PlanRankLayout.
template <typename RowLayout>
class RunsContent {
  using Context = typename RowLayout::Context;
  static constexpr bool kIsRankMajor = RowLayout::kLayout == Layout::kRank;
  static constexpr i32 kEntryWords = kIsRankMajor ? 2 : 1;

 public:
  JAX_EP_DEVICE RunsContent(Context& context, const CountsTables& tables, i32 experts_of_domain)
      : c_(context), layout_(context), tables_(tables), experts_of_domain_(experts_of_domain) {}

  JAX_EP_DEVICE WordRange sent_to(i32 domain) const {
    return range_of(tables_.starts(), domain * experts_of_domain_, experts_of_domain_);
  }
  JAX_EP_DEVICE WordRange read_of(i32 source) const {
    return range_of(tables_.places(source), 0, c_.num_local);
  }
  JAX_EP_DEVICE Ptr<const u32> words(i32 index) const { return as<const u32>(tables_.runs(index)); }

  // What rows hold of one source's entries: of those that begin in the range.
  JAX_EP_DEVICE void read(i32 source, Ptr<const u32> from, const WordRange& range) const {
    const auto last = static_cast<u32>(range.last / kEntryWords);
    u32 position = static_cast<u32>(range.first / kEntryWords) + lane_id();
    Entry ahead = load(from, position, last);
    JAX_EP_NO_UNROLL
    for (; position < last; position += kWarpSize) {
      const Entry entry = ahead;
      ahead = load(from, position + kWarpSize, last);
      take(source, position, entry);
    }
  }

 private:
  JAX_EP_DEVICE static WordRange range_of(Ptr<u32> places, i32 first, i32 count) {
    return {i64{ld(places + first)} * kEntryWords, i64{ld(places + (first + count))} * kEntryWords};
  }

  struct Entry {
    u32 word[kEntryWords];
  };
  JAX_EP_DEVICE static Entry load(Ptr<const u32> from, u32 position, u32 last) {
    Entry entry{};
    if (position >= last) return entry;
    JAX_EP_UNROLL
    for (i32 i = 0; i < kEntryWords; ++i)
      entry.word[i] = ld(from + (i64{position} * kEntryWords + i));
    return entry;
  }

  // One lane: the run that has an entry.
  JAX_EP_DEVICE i32 local_expert_at(i32 source, u32 position) const {
    const Ptr<u32> places = tables_.places(source);
    i32 low = 0;
    i32 high = c_.num_local;  // places[low] <= position < places[high]
    JAX_EP_NO_UNROLL
    while (high - low > 1) {
      const i32 middle = (low + high) / 2;
      if (ld(places + middle) <= position) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // One lane.
  JAX_EP_DEVICE void take(i32 source, u32 position, const Entry& entry) const {
    const i64 token = source * i64{c_.num_tokens} + token_of_run_entry(entry.word[0]);
    const auto index = static_cast<i32>(index_of_run_entry(entry.word[0]));
    const i32 local = local_expert_at(source, position);
    if constexpr (kIsRankMajor) {
      const i32 bin = c_.shape.num_experts + c_.rank;
      const u32 row =
          c_.clip(u64{ld(c_.count_of(bin, source))} + tokens_before_run_entry(entry.word[1]));
      if (row >= c_.capacity) return;
      st(Ptr<i32>{c_.op.row_topk_idx} + (i64{row} * c_.num_topk + index), local);
      if (leads_run_entry(entry.word[1])) put_row(row, token, 0);
    } else {
      const i32 bin = c_.rank * c_.num_local + local;
      const u32 in_run = position - ld(tables_.places(source) + local);
      const u32 row = c_.clip(u64{layout_.start_of(bin)} + ld(c_.count_of(bin, source)) + in_run);
      if (row < c_.capacity) put_row(row, token, index);
    }
  }

  JAX_EP_DEVICE void put_row(u32 row, i64 token, i32 position) const {
    st(Ptr<i32>{c_.op.row_source} + row, static_cast<i32>(token));
    st(Ptr<i32>{c_.op.source_slot} + (token * c_.max_rows + position), static_cast<i32>(row));
  }

  Context& c_;
  const RowLayout layout_;
  const CountsTables& tables_;
  const i32 experts_of_domain_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_INTERNODE_COUNTS_CONTENTS_H_
