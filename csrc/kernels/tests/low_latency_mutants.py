# SPDX-License-Identifier: Apache-2.0
"""The mutants of `mutants.py` that are edits of the low-latency kernels."""

import functools

from mutant import DEVICE, Mutant

KERNELS = "csrc/kernels/low_latency/"
CORE = "csrc/core/low_latency_protocol.h"
LOW_LATENCY = KERNELS + "low_latency_exchange.h"
HEAP = DEVICE + "heap.h"
PEERS = DEVICE + "peers.h"
EXCHANGE = DEVICE + "exchange.h"
PACKETS = KERNELS + "packets.h"
PLAN = KERNELS + "routing_plan.h"
ROWS = KERNELS + "dispatch_rows.h"
DISPATCH = KERNELS + "dispatch_kernel.h"
COMBINE = KERNELS + "combine_kernel.h"

_mutant = functools.partial(Mutant, low_latency=True)


def _removed(name: str, path: str, old: str, after: str = "", **more: int) -> Mutant:
    return _mutant(f"no {name}", path, old, "", after, **more)


LOW_LATENCY_MUTANTS = [
    # --- packets ---------------------------------------------------------------------------------
    _mutant("packets: any flag will do", PACKETS, "packets[i].flag == flag", "packets[i].flag != 0"),
    _mutant("packets: the flag of the last use will do", PACKETS, "packets[i].flag == flag",
            "(packets[i].flag == flag || packets[i].flag + 8 == flag)"),
    _mutant("packets: nothing is missing", PACKETS, "static_cast<u32>(i < count) << i", "0U"),
    _mutant("packets: one is not waited for", PACKETS, "i < count) << i", "i + 1 < count) << i"),
    _mutant("packets: one flag for all exchanges", CORE, "return epoch << 1 | 1;", "return 1;"),
    _mutant("packets: their data and flags are stored apart", DEVICE + "simulated_primitives.h",
            "sizeof packet, sim::Order::kRelaxed", "sizeof packet, sim::Order::kWeak",
            "inline void st_packet("),
    _mutant("packets: the last of a segment is not sent", PACKETS, "ceil_div(num_words, 3)",
            "num_words / 3", "void send_words("),
    _mutant("packets: the last of a segment is not received", PACKETS, "ceil_div(num_words, 3)",
            "num_words / 3", "void receive_words("),
    _mutant("packets: the last of the routing is not sent", CORE,
            "ceil_div(selections, kExpertsPerPacket)", "selections / kExpertsPerPacket"),
    _mutant("packets: experts lie in another order", PACKETS, "16 * (position % 2)",
            "16 * (1 - position % 2)"),
    _mutant("packets: no selection counts as one of expert 0", PACKETS,
            "static_cast<u32>(expert) : kNoExpertInPacket", "static_cast<u32>(expert) : 0U"),
    _mutant("packets: to one place for all sources", HEAP,
            "view.num_neighbors + (source - view.first_neighbor);", "view.num_neighbors;", "i64 packet_source("),
    _mutant("packets: tokens lie closer than they are long", HEAP, "row * view.layout.row_packets",
            "row", "row_packets("),
    # --- banks and their order ---------------------------------------------------------------------
    _mutant("one bank", CORE, "return epoch % uint32_t{kLowLatencyBanks};", "return 0;"),
    _mutant("one flag for all banks", LOW_LATENCY,
            "return static_cast<i32>(bank_of_epoch(exchange.epoch()));", "return 0;"),
    _removed("announcement (dispatch)", DISPATCH,
             "half_.announce(exchange_, plan_.warp, plan_.num_warps);"),
    _removed("announcement (combine)", COMBINE,
             "c_.half.announce(c_.exchange, this_warp(), num_warps());"),
    _removed("look at the peers' calls (dispatch)", DISPATCH,
             "half_.wait_for_peers(exchange_, plan_.warp, plan_.num_warps);", mishaps=True),
    _removed("look at the peers' calls (combine)", COMBINE,
             "c_.half.wait_for_peers(c_.exchange, this_warp(), num_warps());", mishaps=True),
    _removed("wait for a free bank (dispatch)", DISPATCH,
             "half_.wait_until_bank_is_free(exchange_);", seeds=240),
    _removed("wait for a free bank (combine)", COMBINE,
             "c_.half.wait_until_bank_is_free(c_.exchange);", seeds=240),
    _removed("wait for a free bank (announcement)", LOW_LATENCY,
             "wait_until_bank_is_free(exchange);", "if (!sends()) return;", seeds=240),
    _mutant("a bank is taken for free too early", LOW_LATENCY,
            "exchange.epoch() - u32{kLowLatencyBanks};",
            "exchange.epoch() - 2 * u32{kLowLatencyBanks};",
            "void wait_until_bank_is_free(", seeds=240),
    _mutant("peers have ended what this rank has begun", LOW_LATENCY, "begun - behind);", "begun);",
            seeds=240),
    _mutant("a rank has ended what it has begun", LOW_LATENCY, "ended = begun - age - 1;", ";",
            seeds=240),
    _mutant("of two flights the later one counts", LOW_LATENCY,
            "if (ld(flight(view, begun - age)) != 0) ended",
            "if (ended == begun && ld(flight(view, begun - age)) != 0) ended", seeds=400),
    _mutant("banks are not cleared", LOW_LATENCY, "if (clears_bank(exchange.epoch()))", "if (false)"),
    _mutant("the other bank is cleared", LOW_LATENCY, "const u32 epoch = exchange.epoch();",
            "const u32 epoch = exchange.epoch() + 1;", "const HeapLayout& layout = view.layout;"),
    _mutant("banks are cleared of some packets", LOW_LATENCY,
            "packets_per_source * view.num_neighbors", "packets_per_source", seeds=120),
    # --- halves ------------------------------------------------------------------------------------
    _mutant("a first half receives", LOW_LATENCY, "return half_ != Half::kFirst;", "return true;"),
    _mutant("a second half sends again", LOW_LATENCY, "return half_ != Half::kSecond;", "return true;"),
    _mutant("a second half is of the exchange that was begun last", LOW_LATENCY,
            "ld(Ptr<const u32>{params.ticket})", "next_epoch(params.view, Channel::kLowLatency) - 1"),
    _mutant("a second half was announced as another call", LOW_LATENCY,
            "call_tag_of_flight(ld(flight(params.view, epoch)))", "params.call_tag"),
    _mutant("a first half leaves no flight open", LOW_LATENCY,
            "if (half_ == Half::kFirst && lane_id() == 0) leave_open(exchange);", ""),
    _removed("end of a flight", LOW_LATENCY, "st(flight(view, exchange.epoch()), 0);",
             mishaps=True),
    _mutant("an exchange begins in a second half", LOW_LATENCY, "        sends());", "        true);"),
    _mutant("a flight that was left behind keeps its bank", LOW_LATENCY,
            "u32{kLowLatencyBanks} - (sends() ? 1 : 0);", "u32{kLowLatencyBanks};", seeds=400),
    _removed("check of the ticket", LOW_LATENCY, "give_up(view, {WaitTag::kStaleFlight, exchange.op(), view.rank, epoch, 0}, begun);",
             mishaps=True),
    _mutant("a ticket of an earlier exchange of the bank will do", LOW_LATENCY,
            "begun - epoch < u32{kLowLatencyBanks};", "true;", mishaps=True),
    _mutant("a ticket of a bank without flight will do", LOW_LATENCY,
            "const bool is_open = ld(flight(view, epoch)) != 0;", "const bool is_open = true;",
            mishaps=True),
    _mutant("a ticket of any operation will do", LOW_LATENCY,
            "&& ld(Ptr<u32>{ticket_} + 1) == ticket_mark(exchange)", "", mishaps=True),
    _removed("poison in a ticket (dispatch)", DISPATCH, "half_.poison_ticket(exchange_);",
             mishaps=True),
    _removed("poison in a ticket (combine)", COMBINE, "c_.half.poison_ticket(c_.exchange);",
             mishaps=True),
    # --- the plan ----------------------------------------------------------------------------------
    _removed("barrier after the routing has come", PLAN, "c_.warps.sync();", "receive_experts();\n"),
    _removed("barrier after counting", PLAN, "c_.warps.sync();", "count();\n"),
    _removed("barrier after the sums", PLAN, "c_.warps.sync();", "sum_up();\n"),
    _removed("barrier after the starts (low latency)", PLAN, "c_.warps.sync();", "layout_.find_starts();\n"),
    _removed("barrier after the rows", PLAN, "c_.warps.sync();", "hand_out_rows();\n"),
    _removed("warp_sync before a cursor moves", PLAN, "warp_sync();", "row = c_.clip("),
    _mutant("an expert's rows begin at the first", PLAN, "u64{start} + c_.tables", "c_.tables"),
    _mutant("all blocks report all", PLAN, "first, reporter == block_id());", "first, true);"),
    _mutant("a warp's count is left out", PLAN, "for (u32 warp = 0;", "for (u32 warp = 1;"),
    _removed("totals of earlier sources", PLAN, "note_totals_before(selected, counted);"),
    _mutant("tokens of an inactive rank are waited for", PLAN,
            "if (!is_active(c_.exchange.view(), source)) {", "if (false) {", seeds=120),
    _mutant("selections of an inactive rank count", PLAN, "kNone, kNone, kNone", "0, 0, 0"),
    _mutant("the last of the routing is not read", PLAN, "num_expert_packets(selections)",
            "(selections / kExpertsPerPacket)"),
    _removed("report of empty rows", PLAN, "if (lane_id() == 0) layout_.clear_row(row);"),
    _mutant("scalars of others' experts", PLAN, "is_local ? scalar_of(selected) : 0.0F",
            "scalar_of(selected)"),
    # --- rows --------------------------------------------------------------------------------------
    _removed("warp_sync before words become packets", ROWS, "warp_sync();", "void to_wire("),
    _removed("warp_sync after packets became words", ROWS, "if (fp8_wire_) warp_sync();"),
    _removed("proxy fence before bulk stores", ROWS, "fence_proxy_async_shared();"),
    _removed("warp_sync after the proxy fence", ROWS, "warp_sync();",
             "// the copy engine sees what the lanes wrote"),
    _mutant("a stage is used again too soon", ROWS, "bulk_wait_read<1>();", "bulk_wait_read<2>();"),
    _removed("warp_sync before a stage is used again", ROWS, "warp_sync();", "bulk_wait_read<1>();"),
    _removed("commit of bulk stores", ROWS, "bulk_commit();"),
    _removed("wait for bulk stores at the end (low latency)", DISPATCH, "bulk_wait<0>();"),
    _removed("zeros in empty rows", DISPATCH, "rows.clear(row);"),
    _mutant("rows that stay are sent", ROWS, "fp8_wire_ ? -1 : exchange.view().rank",
            "fp8_wire_ ? exchange.view().rank : exchange.view().rank"),
    # --- sums --------------------------------------------------------------------------------------
    _removed("warp_sync after a sum", COMBINE, "warp_sync();", "st(as<Vec16>(stage()) + at"),
    _removed("warp_sync after packets have been read", COMBINE, "warp_sync();",
             "num_words(segment));\n      "),
    _removed("warp_sync before the result is written", COMBINE, "warp_sync();",
             "RowType::pack(sum[i]"),
    _removed("warp_sync after the result is written", COMBINE, "warp_sync();",
             "ld(as<Vec16>(stage()) + v));"),
    _mutant("ranks in the order of the selections", COMBINE,
            "num_earlier(selections.dest(), leaders, c_.num_topk)",
            "count_bits(leaders & lanes_below(lane_id()))", seeds=160),
    _mutant("the rank's own sum is left out", COMBINE, "own.count() > 0);", "false);"),
    _mutant("some ranks' sums are left out", COMBINE, "position < num_sources; ++position",
            "position < num_sources; position += 2"),
    # --- what must not be noticed ------------------------------------------------------------------
    _mutant("low latency, more barriers", ROWS, "warp_sync();", "warp_sync(); warp_sync();",
            harmless=True, seeds=25),
    _mutant("low latency, all calls are cleared up", CORE,
            "return epoch >= kClearBankEvery && epoch % kClearBankEvery < uint32_t{kLowLatencyBanks};",
            "return true;",
            harmless=True, seeds=25),
]  # fmt: skip
