# SPDX-License-Identifier: Apache-2.0
"""The mutants of `mutants.py` that show where ranks do not come and are left out."""

import functools

from mutant import Mutant

LOW_LATENCY = "csrc/kernels/low_latency/"
CORE = "csrc/core/low_latency_protocol.h"
MISSING = LOW_LATENCY + "missing_ranks.h"
EXCHANGE = LOW_LATENCY + "masking_exchange.h"
PLAN = LOW_LATENCY + "routing_plan.h"
ROWS = LOW_LATENCY + "dispatch_rows.h"
DISPATCH = LOW_LATENCY + "dispatch_kernel.h"
COMBINE = LOW_LATENCY + "combine_kernel.h"

_mutant = functools.partial(Mutant, absences=True)

# No story notices, within many seeds: that a thread which gives up a source that another block has
# found present meanwhile must go on waiting (routing_plan.h, experts_of), and that a row which has
# not come is an empty group of bulk stores (dispatch_rows.h, try_expand).

MISSING_RANK_MUTANTS = [
    # --- verdicts --------------------------------------------------------------------------------
    _mutant("missing: verdicts are stored, and not agreed on", MISSING,
            "const u32 old = replace(word, seen, verdict);",
            "st_release<Scope::kGpu>(word, verdict_word(epoch_, verdict)); const u32 old = seen;"),
    _mutant("missing: who loses keeps its own verdict", MISSING, "return this->verdict(source);",
            "return verdict;"),
    _mutant("missing: a verdict is of any exchange", CORE, "word >> 2 == (epoch & 0x3FFF'FFFF)",
            "word != 0 || epoch == 0"),
    _mutant("missing: selections of missing ranks count", PLAN, "leave_out_missing();", ""),
    _mutant("missing: experts of missing ranks are selected", PLAN,
            "| tables_.total_before(owner)", ""),
    _mutant("missing: no barrier after the verdicts", PLAN, "c_.warps.sync();", "",
            "settle_sources();\n"),
    _mutant("missing: no barrier after missing ranks are left out", PLAN, "c_.warps.sync();", "",
            "leave_out_missing();\n"),
    # --- rows and sums ---------------------------------------------------------------------------
    _mutant("missing: who is given up later is not missing", MISSING,
            "verdict == Verdict::kMissing || verdict == Verdict::kTorn",
            "verdict == Verdict::kMissing"),
    _mutant("missing: who was present is not given up", MISSING,
            "replace(own_verdict(view_, source), verdict_word(epoch_, Verdict::kPresent), "
            "Verdict::kTorn);", ""),
    _mutant("missing: a part of a rank's rows stays", DISPATCH,
            "plan.empty_rows_of(source, [&rows](i64 row) { rows.clear(row, true); });",
            "static_cast<void>(rows);"),
    _mutant("missing: a token keeps its row at a rank that is torn", DISPATCH,
            "plan.empty_slots_at(source);", ""),
    _mutant("missing: rows that have not come are written", ROWS,
            "if (warp_ballot(!came) != 0) {", "if (false) {"),
    _mutant("missing: a row that has not come is not told", DISPATCH,
            "if (!came && lane_id() == 0) MissingRanks(exchange_).give_up_on(source);", ""),
    _mutant("missing: a scalar that has not come is not told", PLAN,
            "MissingRanks(c_.exchange).give_up_on(selected.source);", ""),
    _mutant("missing: a part of a rank's sums stays", COMBINE, "if (!mends && close_if_last()) {",
            "if (!mends && close_if_last() && false) {"),
    _mutant("missing: sums are made again with all ranks", COMBINE, "if (mends && leads)",
            "if (false)"),
    _mutant("missing: a sum that has not come is not told", COMBINE,
            "MissingRanks(c_.exchange).give_up_on(source);", ""),
    # --- how long is waited ----------------------------------------------------------------------
    _mutant("missing: no heartbeat", MISSING,
            "for_each_peer(view_, [&](i32 peer) { put_heartbeat(view_, peer, word); });",
            "static_cast<void>(word);"),
    _mutant("missing: heartbeats are not heard", MISSING,
            "if (heartbeat == (heartbeat_and_level_ & ~0xFFU)) return;",
            "if (heartbeat != 1) return;"),
    _mutant("missing: heartbeats count as old", MISSING, "heard_at_ = now;", ""),
    _mutant("missing: who sends heartbeats is waited for for ever", MISSING,
            "waited / kMostTimeouts > timeout", "false"),
    _mutant("missing: the host is not asked", MISSING, "(polls > 1 && host_gives_up())", "false"),
    _mutant("missing: who is left out is not told", EXCHANGE,
            "if (!is_there) put_masked(view, peer, masked_in(exchange.epoch()));", ""),
    _mutant("missing: who is left out does not look", MISSING, " || masks_us()", ""),
    _mutant("missing: who gives up ends the others", "csrc/device/wait.h",
            " && view.given_up == nullptr", ""),
    _mutant("missing: any call of a rank will do", EXCHANGE,
            "return came && seen == exchange.own_flag();", "return came;"),
    _mutant("missing: a wait that was given up stays the last", MISSING, "patience.end(!came);",
            "if (came) patience.end();"),
    _mutant("missing: a wait for a word that was given up stays the last", MISSING,
            "patience.end(over);", "if (!over) patience.end();"),
    _mutant("missing: who was left out once is left out always", MISSING,
            "!has_reached(epoch_of(seen), epoch_)", "false"),
    _mutant("missing: who has been given up is waited for again", MISSING,
            "MissingRanks(view_, epoch_).is_given_up(context_.peer) || ", ""),
    # --- who comes back --------------------------------------------------------------------------
    _mutant("missing: packets of an older exchange of the bank will do", MISSING,
            "packets[i].flag != flag", "(packets[i].flag & 7) != (flag & 7)"),
    _mutant("missing: an arrival in an older exchange of the bank will do", EXCHANGE,
            "word != 0 && epoch_of(word) == epoch", "word != 0"),
    _mutant("missing: who has not come counts as having read", EXCHANGE,
            "any_missing || ", ""),
    _mutant("missing: what all have ended is never renewed", LOW_LATENCY + "low_latency_exchange.h",
            "!has_reached(ld(seen), oldest)", "false"),
    _mutant("missing: a mask that leaves out nobody may leave out somebody", EXCHANGE,
            "warp_ballot(!all_take_part) == 0", "all_active(view)"),
    _mutant("missing: who is ahead counts as behind", EXCHANGE,
            "has_reached(ended, begun) ? 0 : begun - ended", "begun - ended"),
    _mutant("missing: who has not read is sent to", EXCHANGE,
            "return (given_up_ >> peer & 1) == 0;", "return true;"),
    _mutant("missing: who has not read holds the bank", EXCHANGE,
            "if (!has_ended) missing.give_up_on(peer);", ""),
]  # fmt: skip
