# SPDX-License-Identifier: Apache-2.0
"""The mutants of `mutants.py` that show where who takes part changes from call to call."""

import functools

from mutant import DEVICE, Mutant

HIGH_THROUGHPUT = "csrc/kernels/high_throughput/"
LOW_LATENCY = "csrc/kernels/low_latency/"
EXCHANGE = DEVICE + "exchange.h"
PEERS = DEVICE + "peers.h"

_mutant = functools.partial(Mutant, masks=True, seeds=120)
_low_latency = functools.partial(_mutant, low_latency=True)

RANK_MASK_MUTANTS = [
    _mutant("masks: who comes back acknowledges nothing", EXCHANGE,
            "if (block_of_call() == 0 && warp_id() + 1 == num_threads() / kWarpSize) acknowledge_before();",
            ""),
    _mutant("masks: who comes back acknowledges what it has not read", EXCHANGE,
            "peer, epoch_ - 1);", "peer, epoch_);", "void acknowledge_before"),
    _mutant("masks: nobody notes who was not told", EXCHANGE, "all_active(view_) ? 0 : 1", "0"),
    _mutant("masks: only who sat out notes that it was not told", EXCHANGE,
            "all_active(view_) ? 0 : 1", "takes_part() ? 0 : 1"),
    _mutant("masks: who sits out tells the others", EXCHANGE, "if (takes_part()) acknowledge();",
            "acknowledge();"),
    _mutant("masks: an exchange that a rank sits out does not count", EXCHANGE,
            "if (begins) st(", "if (begins && takes_part()) st("),
    _mutant("masks: a rank does not know that it is left out", EXCHANGE,
            "return is_active(view_, view_.rank);", "return true;"),
    _mutant("masks: another rank's entry", PEERS, "(8 * (peer % 4))", "(8 * (peer % 2))"),
    _mutant("masks: rows of who sits out are left alone", HIGH_THROUGHPUT + "dispatch_kernel.h",
            "leave_empty_rows<typename RowLayout::RowType>(context_.exchange, context_.op);", ""),
    _mutant("masks: sums of who sits out are left alone", HIGH_THROUGHPUT + "combine_kernel.h",
            "leave_empty_sums<typename RowLayout::Context::RowType>(c_.exchange, c_.params.op);", ""),
    _mutant("masks: the plan of who sits out is left alone", HIGH_THROUGHPUT + "plan_kernel.h",
            "leave_empty_plan(context_.exchange, context_.op);", ""),
    _low_latency("masks: a low-latency exchange that a rank sits out does not count", EXCHANGE,
                 "if (begins) st(", "if (begins && takes_part()) st("),
    _low_latency("masks: low-latency results of who sits out are left alone",
                 LOW_LATENCY + "dispatch_kernel.h",
                 "if (half_.receives()) leave_empty_results();", ""),
    _low_latency("masks: low-latency sums of who sits out are left alone",
                 LOW_LATENCY + "combine_kernel.h",
                 "if (c_.half.receives()) leave_empty_sums<RowType>(c_.exchange, c_.params.op);", ""),
    # --- what must not be noticed ------------------------------------------------------------------
    _mutant("masks, more acknowledgments", EXCHANGE, "all_active(view_) ? 0 : 1", "1", harmless=True,
            seeds=25),
]  # fmt: skip
