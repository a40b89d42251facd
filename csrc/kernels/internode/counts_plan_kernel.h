// SPDX-License-Identifier: Apache-2.0
// Plan by counts, where there are many domains: no rank sees another's routing, and none scans more
// than its own selections and those that it receives. What comes out is what the plan that gathers
// all routing (plan_kernel.h) makes, to the bit. The steps, with a grid barrier between them:
//   1. count     selections per tile of the rank's own tokens, and bin
//   2. scan      per bin: counts become the number of earlier selections; what the rank has in all
//   3. counts    of all ranks are exchanged
//   4. scan      per bin: how many rows come before those of a source; where runs begin
//   5. assign    slots of the rank's own selections, which are sorted into runs, one per expert
//   6. runs      are exchanged; each rank writes what its rows hold
// docs/design/internode.md explains it.
#ifndef JAX_EP_CSRC_KERNELS_INTERNODE_COUNTS_PLAN_KERNEL_H_
#define JAX_EP_CSRC_KERNELS_INTERNODE_COUNTS_PLAN_KERNEL_H_

#include "csrc/kernels/closed_results.h"
#include "csrc/kernels/high_throughput/plan_assign.h"
#include "csrc/kernels/high_throughput/plan_expert_layout.h"
#include "csrc/kernels/high_throughput/plan_rank_layout.h"
#include "csrc/kernels/internode/counts_contents.h"
#include "csrc/kernels/internode/counts_own_tokens.h"
#include "csrc/kernels/internode/counts_scan.h"

namespace jax_ep::dev {

// `RowLayout` is PlanExpertLayout or PlanRankLayout.
template <typename RowLayout, typename Transport>
class CountsPlanKernel {
 public:
  static constexpr bool kHasTail = false;
  using Params = InternodeParams<PlanOp, Transport>;

  // A source's tokens are one tile of the context: of all that it counts there is one number for
  // each source. And what goes by the rail is counted in messages, not in tokens.
  JAX_EP_DEVICE explicit CountsPlanKernel(const Params& params)
      : c_(params.op,
           exchange_of(params),
           {},
           RowLayout::kLayout,
           params.op.shape.num_tokens > 0 ? static_cast<i32>(params.op.shape.num_tokens) : 1),
        messages_(
            counts_plan_messages(params.network.layout, params.network.topology, params.op.shape)),
        tables_(params.view, params.network, params.op.shape),
        rail_(c_.exchange,
              params.network,
              params.transport,
              messages_.total(),
              /*tokens_per_chunk=*/1) {}

  JAX_EP_DEVICE void run() {
    if (c_.exchange.closed()) {
      poison_plan(c_.exchange, c_.op);
      c_.exchange.report_closed();
      return;
    }
    const bool has_tokens = c_.num_tokens > 0;
    CountsOwnTokens<RowLayout> own(c_, tables_);
    PlanAssigner<RowLayout> rows(c_);
    if (has_tokens) tell_counts(own);
    const CountsScan<Context> scan(c_, tables_);
    scan.scan_sources();
    if (has_tokens) scan.find_runs();
    barrier();
    rows.find_starts();
    if (has_tokens) tell_runs(own);
    rows.report();
    c_.exchange.finish([this] {
      c_.exchange.acknowledge();
      if (lane_id() == 0) rail_.advance(/*with_units=*/false);
    });
  }

 private:
  using Context = typename RowLayout::Context;
  static constexpr i32 kCountsFlag = 0;
  static constexpr i32 kRunsFlag = 1;

  JAX_EP_DEVICE void barrier() const { c_.exchange.grid_barrier(c_.warps); }

  // Steps 1 to 3.
  JAX_EP_DEVICE void tell_counts(CountsOwnTokens<RowLayout>& own) {
    own.count();
    barrier();
    own.scan();
    barrier();
    CountsExchange<Context, Transport>(c_, rail_, messages_)
        .exchange(CountsPhase{0, messages_.counts, kCountsFlag},
                  CountsContent(c_.bins, tables_),
                  [this] { clear_tokens(); });
    barrier();
  }

  // Steps 5 and 6.
  JAX_EP_DEVICE void tell_runs(CountsOwnTokens<RowLayout>& own) {
    own.assign();
    barrier();
    const i32 experts_of_domain = c_.num_local * rail_.num_ranks();
    CountsExchange<Context, Transport>(c_, rail_, messages_)
        .exchange(CountsPhase{messages_.counts, messages_.total(), kRunsFlag},
                  RunsContent<RowLayout>(c_, tables_, experts_of_domain),
                  [] {});
  }

  // All tokens have no rows, before runs say which they have.
  JAX_EP_DEVICE void clear_tokens() const {
    const i64 tokens = i64{c_.num_ranks} * c_.num_tokens;
    c_.exchange.fill(Ptr<i32>{c_.op.source_slot}, tokens * c_.max_rows, -1);
    if constexpr (RowLayout::kLayout == Layout::kRank) {
      c_.exchange.fill(Ptr<i32>{c_.op.row_topk_idx}, i64{c_.capacity} * c_.num_topk, -1);
    }
  }

  Context c_;
  const CountsPlanMessages messages_;
  const CountsTables tables_;
  const Rail<Transport> rail_;
};

}  // namespace jax_ep::dev

#endif  // JAX_EP_CSRC_KERNELS_INTERNODE_COUNTS_PLAN_KERNEL_H_
