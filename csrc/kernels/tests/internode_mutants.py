# SPDX-License-Identifier: Apache-2.0
"""The mutants of `mutants.py` that are edits of the kernels between domains."""

import functools

from mutant import DEVICE, Mutant

KERNELS = "csrc/kernels/internode/"
RAIL = DEVICE + "rail.h"
PEERS = DEVICE + "peers.h"
LAYOUT = "csrc/core/network_layout.h"
KERNEL_PHASE = DEVICE + "kernel_phase.h"
MESSAGE = KERNELS + "message.h"
SENDER = KERNELS + "rail_sender.h"
RECEIVER = KERNELS + "rail_receiver.h"
DISPATCH = KERNELS + "dispatch_kernel.h"
SUMS = KERNELS + "rail_sums.h"
COMBINE = KERNELS + "combine_kernel.h"
ROUTING = KERNELS + "plan_routing.h"
PLAN = KERNELS + "plan_kernel.h"
PLAN_CONTEXT = "csrc/kernels/high_throughput/plan_context.h"
COUNTS_EXCHANGE = KERNELS + "counts_exchange.h"
COUNTS_CONTENTS = KERNELS + "counts_contents.h"
COUNTS_OWN = KERNELS + "counts_own_tokens.h"
COUNTS_SCAN = KERNELS + "counts_scan.h"
COUNTS_PLAN = KERNELS + "counts_plan_kernel.h"

_mutant = functools.partial(Mutant, internode=True)


def internode_operation(mutant: Mutant) -> str:
    """The operation that sees a mutant: what all three use is seen in combine, or in dispatch."""
    if mutant.by_counts or mutant.path in {ROUTING, PLAN, PEERS}:
        return "plan"
    of_pull = any(word in mutant.name for word in ("relay", "pull", "told of a message", "half"))
    if mutant.path in {SENDER, RECEIVER, DISPATCH} or of_pull:
        return "dispatch"
    return "combine"


def _removed(name: str, path: str, old: str, after: str = "", **more: int) -> Mutant:
    return _mutant(f"rail: no {name}", path, old, "", after, **more)


def _relaxed(name: str, after: str) -> list[Mutant]:
    return [
        _mutant(f"rail: {name}: release -> relaxed", RAIL, "st_release", "st_relaxed", after),
        _mutant(f"rail: {name}: sys -> gpu", RAIL, "st_release<Scope::kSys>",
                "st_release<Scope::kGpu>", after),
    ]  # fmt: skip


def _of_counts(
    name: str, path: str, old: str, new: str = "", after: str = "", **more: int
) -> Mutant:
    return _mutant(f"counts: {name}", path, old, new, after, by_counts=True, **more)


_NO_WAIT = "if (lane_id() == 0) "

COUNTS_MUTANTS = [
    # --- words ---
    _of_counts("no credit waited for", COUNTS_EXCHANGE,
               f"{_NO_WAIT}rail_.wait_credit(domain, message);"),
    _of_counts("no message waited for", COUNTS_EXCHANGE,
               f"{_NO_WAIT}rail_.wait_delivered(domain, message);"),
    _of_counts("no relay waited for", COUNTS_EXCHANGE,
               "rail_.wait_relayed(rail, domain, message);", "{}"),
    _of_counts("no reader waited for", COUNTS_EXCHANGE, "rail_.wait_pulled(domain, message);"),
    _of_counts("no rank of the domain waited for", COUNTS_EXCHANGE,
               "c_.exchange.wait_arrived(source, phase.flag);", "{}"),
    _of_counts("runs of the domain with the flag of its counts", COUNTS_PLAN,
               "kRunsFlag = 1", "kRunsFlag = 0"),
    _of_counts("no acknowledgment waited for", COUNTS_OWN, "c_.exchange.wait_until_writable();",
               seeds=100),
    _of_counts("messages are counted anew", COUNTS_PLAN,
               "if (lane_id() == 0) rail_.advance(/*with_units=*/false);"),
    # --- barriers ---
    _of_counts("no warp_sync after the credit", COUNTS_EXCHANGE, "warp_sync();", "",
               "wait_credit"),
    _of_counts("no warp_sync after what is there", COUNTS_EXCHANGE, "warp_sync();", "",
               "wait_relayed"),
    _of_counts("no warp_sync before pulled", COUNTS_EXCHANGE, "warp_sync();", "",
               "content.read(source, from, range.part(part));"),
    _of_counts("no barrier after tiles are counted", COUNTS_PLAN, "barrier();", "",
               "own.count();"),
    _of_counts("no barrier before counts are sent", COUNTS_PLAN, "barrier();", "", "own.scan();"),
    _of_counts("no barrier after counts have come", COUNTS_PLAN, "barrier();", "",
               "clear_tokens(); });"),
    _of_counts("no barrier before rows are handed out", COUNTS_PLAN, "barrier();", "",
               "scan.find_runs();"),
    _of_counts("no barrier before runs are sent", COUNTS_PLAN, "barrier();", "", "own.assign();"),
    _of_counts("no warp_sync before cursors move", COUNTS_OWN, "warp_sync();", "",
               "st(Ptr<i32>{c_.op.slot}"),
    _of_counts("no warp_sync before a tile's cursors are read", COUNTS_OWN, "warp_sync();", "",
               "JAX_EP_DEVICE void assign() {"),
    # --- counts and places ---
    _of_counts("what fills up a message is not written", MESSAGE, "st(to + i, 0U);"),
    _of_counts("the last word does not travel", MESSAGE,
               "return 4 * words;", "return words > 0 ? 4 * words - 16 : 0;"),
    _of_counts("every message has the first words", COUNTS_EXCHANGE,
               "all.within(all.first + begin, all.first + begin + words_)",
               "all.within(all.first, all.first + words_)"),
    _of_counts("one part is not read", COUNTS_EXCHANGE, "(part_idx + 1) * words);",
               "(part_idx + (part_idx < kRailChunkParts - 1)) * words);"),
    _of_counts("parts leave the rest", COUNTS_EXCHANGE, "ceil_div(count(), kRailChunkParts)",
               "count() / kRailChunkParts"),
    _of_counts("tokens are not cleared", COUNTS_PLAN, "[this] { clear_tokens(); }", "[] {}"),
    _of_counts("a source's own selections come before it", COUNTS_SCAN,
               "st(c_.count_of(bin, source), total);",
               "st(c_.count_of(bin, source), total + count_here[i]);"),
    _of_counts("what is before own tokens is not known", COUNTS_SCAN,
               "owner == c_.rank || source == c_.rank", "owner == c_.rank"),
    _of_counts("runs of other domains begin as those of the own", COUNTS_SCAN,
               "is_neighbor(view, i) ? 0 : view.first_neighbor * c_.num_local", "0"),
    _of_counts("runs of the own domain begin as those of others", COUNTS_SCAN,
               "is_neighbor(view, i) ? 0 : view.first_neighbor * c_.num_local",
               "view.first_neighbor * c_.num_local"),
    _of_counts("the next domain's runs", COUNTS_CONTENTS,
               "domain * experts_of_domain_, experts_of_domain_)",
               "(domain > 0 ? domain - 1 : 0) * experts_of_domain_, experts_of_domain_)"),
    _of_counts("a token's experts of other ranks count", COUNTS_OWN,
               "owner_of(other, c_.num_local) == owner", "owner >= 0"),
    _of_counts("every selection stands for its token's row", COUNTS_CONTENTS,
               "if (leads_run_entry(entry.word[1])) put_row", "put_row"),
    _of_counts("tiles begin where they end", PLAN_CONTEXT, "total + sum - count_here[i]);",
               "total + sum);"),
    # --- harmless ---
    _of_counts("ranks of the domain are read in their order", COUNTS_EXCHANGE,
               "(item / kRailChunkParts + rail_.index())", "(item / kRailChunkParts)",
               harmless=True, seeds=15),
    _of_counts("all steps begin with the same warp", COUNTS_EXCHANGE,
               "c_.warp - first_warp;", "c_.warp - 0 * first_warp;", harmless=True, seeds=15),
]  # fmt: skip

INTERNODE_MUTANTS = [
    *COUNTS_MUTANTS,
    # --- words ---
    *_relaxed("relayed", "RELEASE(relayed)"),
    *_relaxed("pulled", "RELEASE(pulled)"),
    *_relaxed("gathered", "RELEASE(gathered)"),
    *_relaxed("freed", "RELEASE(freed)"),
    _removed("end that the host is told of", RAIL, "put_end(exchange_, network_);"),
    _mutant("rail: the host is told of the exchange before", KERNEL_PHASE, "exchange.epoch()",
            "exchange.epoch() - 1"),
    _mutant("rail: the host is told of another channel", KERNEL_PHASE,
            "static_cast<i32>(exchange.channel())", "1"),
    _removed("acquired (credit)", RAIL, "transport_.acquired(word);", "ACQUIRE(credit)"),
    _removed("acquired (delivered)", RAIL, "transport_.acquired(word);", "ACQUIRE(delivered)"),
    _mutant("rail: waits of gpu scope", RAIL, "wait_until<Scope::kSys>", "wait_until<Scope::kGpu>",
            "One lane: until the word is of a message."),
    _mutant("rail: counts of gpu scope", RAIL, "wait_until<Scope::kSys>",
            "wait_until<Scope::kGpu>", "void wait_count("),
    _mutant("rail: any message will do", RAIL, "seen != 0 && epoch_of(seen) == message",
            "seen != 0"),
    _mutant("rail: the message before will do", RAIL, "epoch_of(seen) == message;",
            "epoch_of(seen) + 1 >= message;"),
    _mutant("rail: what is there before the first use counts", RAIL, "seen != 0 && ", ""),
    _mutant("rail: any unit will do", RAIL, "return seen == count;", "return seen != 0;"),
    _mutant("rail: a buffer's first use waits for a credit", RAIL,
            "if (sequence_number(chunk) < window) return;", ""),
    _mutant("rail: the credit of a message too early", RAIL, "sequence_number(chunk) - window)",
            "sequence_number(chunk) - 2 * window)"),
    _mutant("rail: a unit is freed too early", RAIL, "unit - units + 1,", "unit - 2 * units + 1,"),
    _removed("credit waited for (dispatch)", SENDER,
             "if (lane_id() == 0) rail_.wait_credit(domain, chunk);"),
    _removed("credit waited for (combine)", SUMS,
             "if (lane_id() == 0) rail_.wait_credit(domain, chunk);"),
    _removed("credit waited for (plan)", ROUTING,
             "if (lane_id() == 0) rail_.wait_credit(domain, chunk);"),
    _removed("message waited for (relay)", RECEIVER,
             "if (lane_id() == 0) rail.wait_delivered(domain, chunk);"),
    _removed("message waited for (combine)", COMBINE,
             "rail_.wait_delivered(rail_.domain_at_turn(turn), chunk);"),
    _removed("message waited for (plan)", ROUTING,
             "if (lane_id() == 0) rail_.wait_delivered(domain, chunk);"),
    _removed("relay waited for", RECEIVER,
             "if (lane_id() == 0) rail_.wait_relayed(rail, domain, chunk);"),
    _removed("pull waited for", RECEIVER, "rail.wait_pulled(domain, chunk);"),
    _removed("unit waited for", SUMS, "rail_.wait_gathered(unit);"),
    _removed("free unit waited for", SUMS, "if (lane_id() == 0) rail_.wait_freed(rail, unit);"),
    _removed("acknowledgment waited for by a plan's relays", ROUTING,
             "c_.exchange.wait_until_writable();"),
    _mutant("rail: one rank's pull is not waited for", RAIL, "i < num_ranks() * kRailChunkParts",
            "i < (num_ranks() - 1) * kRailChunkParts", "void wait_pulled("),
    _mutant("rail: one part's pull is not waited for", RAIL, "i < num_ranks() * kRailChunkParts",
            "i + 1 < num_ranks() * kRailChunkParts", "void wait_pulled("),
    _mutant("rail: one rank's sums are not waited for", RAIL, "share_out_ranks([&](i32 rank) {",
            "share_out_ranks([&](i32 rank) { if (rank + 1 == num_ranks()) return;",
            "void wait_gathered("),
    _mutant("rail: one domain's message is not waited for", COMBINE,
            "turn < rail_.num_others(); turn += kWarpSize",
            "turn + 1 < rail_.num_others(); turn += kWarpSize"),
    _mutant("rail: the own domain's rows are not waited for", COMBINE,
            "if (source != c_.rank) c_.exchange.wait_arrived(source, flag_idx);", ""),
    _mutant("rail: one rank is not told of a message", RAIL, "share_out_ranks([&](i32 rank) {",
            "share_out_ranks([&](i32 rank) { if (rank + 1 == num_ranks()) return;", "void relay("),
    # --- barriers ---
    _removed("warp_sync before a message", RAIL, "warp_sync();", "void send("),
    _removed("warp_sync before relayed", RAIL, "warp_sync();", "void relay("),
    _removed("warp_sync before gathered", RAIL, "warp_sync();", "void put_gathered("),
    _removed("warp_sync after pulled", RAIL, "warp_sync();", "ACQUIRE(pulled)"),
    _removed("warp_sync after the credit (dispatch)", SENDER, "warp_sync();", "wait_credit"),
    _removed("warp_sync after the credit (combine)", SUMS, "warp_sync();", "wait_credit"),
    _removed("warp_sync after freed", SUMS, "warp_sync();", "wait_freed"),
    _removed("warp_sync after relayed", RECEIVER, "warp_sync();", "wait_relayed"),
    _mutant("rail: no warp_sync before pulled", RECEIVER,
            "warp_sync();\n    if (lane_id() == 0) rail_.put_pulled",
            "if (lane_id() == 0) rail_.put_pulled"),
    _removed("warp_sync before parts are counted", COMBINE, "warp_sync();", "receiver.sum(part);"),
    _removed("warp_sync after what has arrived (combine)", COMBINE, "warp_sync();",
             "c_.exchange.wait_arrived(source, flag_idx);"),
    _removed("warp_sync before a plan's relayed flags", ROUTING, "warp_sync();",
             "relay_expert(view, peer"),
    _removed("warp_sync after a plan's message", ROUTING, "warp_sync();", "wait_delivered"),
    _removed("warp_sync between what fills up and what is stored", MESSAGE, "warp_sync();"),
    _removed("proxy fence before rows are pulled", RECEIVER, "fence_proxy_async_global();"),
    _removed("proxy fence before rows are packed", SENDER, "fence_proxy_async_global();"),
    _removed("wait for the rows of a message", SENDER, "bulk_wait<0>();"),
    _mutant("rail: rows of a message are only read", SENDER, "bulk_wait<0>();",
            "bulk_wait_read<0>();"),
    _mutant("rail: relayed: release -> relaxed (plan)", PEERS, "st_release", "st_relaxed",
            "void relay_arrived("),
    _mutant("rail: parts: acq_rel -> relaxed", COMBINE, "fetch_add_acq_rel<Scope::kGpu>(word, 1)",
            "fetch_add_relaxed<Scope::kGpu>(word, 1)"),
    # --- counts and places ---
    _mutant("rail: one buffer", RAIL, "sequence_number(chunk) % static_cast<u64>(layout().window)",
            "sequence_number(chunk) % u64{1}"),
    _mutant("rail: messages are counted anew", RAIL,
            "st(sequence(0), sequence_ + static_cast<u64>(num_chunks_));",
            "st(sequence(0), sequence_);"),
    _mutant("rail: units are counted anew", RAIL,
            "first_unit_ + static_cast<u64>(num_chunks_) * static_cast<u64>(num_others())",
            "first_unit_"),
    _mutant("rail: what was said last is forgotten", RAIL, "st(last, signal.after);", ""),
    _mutant("rail: parts are not counted anew", COMBINE, "st(word, 0);", ""),
    _mutant("rail: a credit with the first part", COMBINE, "+ 1 != kRailChunkParts) return;",
            "+ 1 != 1) return;"),
    _mutant("rail: messages of two domains in one ring", RAIL,
            "return domain < holder ? domain : domain - 1;", "return 0;"),
    _mutant("rail: units of all ranks in one place", RAIL, "(at * num_ranks() + rank)",
            "(at * num_ranks())"),
    _mutant("rail: pulled parts in one word", RAIL, "* kRailChunkParts + part);",
            "* kRailChunkParts);"),
    _mutant("rail: pulls of all ranks in one word", RAIL, "(i64{reader} * num_buffers()",
            "(i64{0} * num_buffers()"),
    _mutant("rail: relays of all rails in one word", RAIL,
            "(i64{index_} * num_buffers() + buffer(domain, chunk))", "buffer(domain, chunk)"),
    _mutant("rail: the rings of all domains lie in one", RAIL, "i64{ring} * layout().window",
            "i64{0}"),
    _mutant("rail: a header of the chunk before", SENDER, "write_header(message, tokens);",
            "write_header(message, TokenSet{tokens.bits >> 1});"),
    _mutant("rail: rows lie where the header is", MESSAGE,
            "kMessageHeaderBytes + position * row_bytes", "position * row_bytes"),
    _mutant("rail: the last row does not travel", SENDER, "message_.bytes(tokens.count())",
            "message_.row(tokens.count() > 0 ? tokens.count() - 1 : 0)"),
    _mutant("rail: tokens of the second half are left out", MESSAGE,
            "half < kMaxRailChunkTokens / static_cast<i32>(kWarpSize)", "half < 1"),
    _mutant("rail: tokens are counted in the first half alone", MESSAGE,
            "count_bits(static_cast<u32>(bits >> 32)));", "0U);", "i32 count()"),
    _mutant("rail: scalars of the first rank", MESSAGE, "count_bits(holders & lanes_below(rank))",
            "count_bits(holders & 0U)"),
    _mutant("rail: not all holders are said", SUMS, "merged.write_holders(holders);",
            "merged.write_holders(holders & (holders - 1));"),
    _mutant("rail: sums in the reverse order of ranks", SUMS,
            "count_bits(holders & lanes_below(lane_id()))",
            "count_bits(holders & ~lanes_below(lane_id()) & ~(1U << lane_id()))",
            every_dtype=True),
    _mutant("rail: one holder's sum counts twice", SUMS, "shfl_pointer(row, from < 0 ? 0 : from)",
            "shfl_pointer(row, static_cast<i32>(lowest_bit(holders | 1U << 31)))"),
    _mutant("rail: a chunk begins a token late", RAIL, "return i64{chunk} * tokens_per_chunk_;",
            "return i64{chunk} * tokens_per_chunk_ + (chunk > 0);"),
    _mutant("rail: routing goes to one peer less", ROUTING, "relay_expert(view, peer,",
            "if (peer != view.first_neighbor) relay_expert(view, peer,"),
    _mutant("rail: routing as that of another rank", ROUTING,
            "rail_.rank_at(domain, rail_.index());", "rail_.rank_at(domain, 0);"),
    # --- roles ---
    _mutant("rail: a rank's own domain gets what is for others", DISPATCH,
            ".within(view.first_neighbor, view.num_neighbors)", ""),
    _mutant("rail: one domain gets no message", SENDER, "item / others);\n",
            "item / others);\n      if (others > 1) item += num_warps;\n"),
    _mutant("rail: an own row counts as another domain's", COMBINE,
            "rail_.domain_of(dest) != rail_.domain()", "rail_.domain_of(dest) != 0"),
    _mutant("rail: every rank of a domain is a term", COMBINE,
            "lowest_bit(same_domain) == lane_id() &&", "selections.leads() &&"),
    # --- harmless ---
    _mutant("rail: a token that was dropped travels", SENDER,
            "if (!has_row(c_.shape, expert, slot)) continue;", "if (expert < 0) continue;",
            harmless=True, seeds=15),
    _mutant("rail: senders in reverse order of domains", SENDER,
            "rail_.domain_at_turn(item % others)",
            "rail_.domain_at_turn(others - 1 - item % others)", harmless=True, seeds=15),
    _mutant("rail: one more warp_sync before a message", RAIL, "warp_sync();",
            "warp_sync(); warp_sync();", "void send(", harmless=True, seeds=15),
]  # fmt: skip
