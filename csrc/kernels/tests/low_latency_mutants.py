# SPDX-License-Identifier: Apache-2.0
"""The mutants of `mutants.py` that are edits of the low-latency kernels."""

import functools

from mutant import DEVICE, Mutant

KERNELS = "csrc/kernels/low_latency/"
CORE = "csrc/core/low_latency_protocol.h"
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
            "(packets[i].flag == flag || packets[i].flag + 4 == flag)"),
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
    _mutant("packets: experts lie in another order", PACKETS, "16 * (place % 2)",
            "16 * (1 - place % 2)"),
    _mutant("packets: no selection counts as one of expert 0", PACKETS,
            "static_cast<u32>(expert) : kNoExpertInPacket", "static_cast<u32>(expert) : 0U"),
    _mutant("packets: to one place for all sources", HEAP, "view.num_ranks + source;",
            "view.num_ranks;", "i64 packet_source("),
    _mutant("packets: tokens lie closer than they are long", HEAP, "row * view.layout.row_packets",
            "row", "row_packets("),
    # --- banks and their order ---------------------------------------------------------------------
    _mutant("one bank", CORE, "return epoch % uint32_t{kLowLatencyBanks};", "return 0;"),
    _mutant("one flag for both banks", PACKETS,
            "return static_cast<i32>(bank_of_epoch(exchange.epoch()));", "return 0;"),
    _removed("announcement (dispatch)", DISPATCH, "if (announces_exchange(plan_.warp, plan_.num_warps)) announce_exchange(exchange_);"),
    _removed("announcement (combine)", COMBINE,
             "if (announces_exchange(this_warp(), num_warps())) announce_exchange(c_.exchange);"),
    _removed("wait for the exchange (dispatch)", PLAN,
             "if (waits_for_exchange(c_.warp, c_.num_warps)) wait_for_exchange(c_.exchange);",
             seeds=240),
    _removed("wait for the exchange (combine)", COMBINE,
             "if (waits_for_exchange(this_warp(), num_warps())) wait_for_exchange(c_.exchange);",
             seeds=60),
    _removed("look at the peers' calls (combine)", COMBINE,
             "if (waits_for_exchange(this_warp(), num_warps())) wait_for_exchange(c_.exchange);",
             mishaps=True),
    _mutant("banks are not cleared", PACKETS, "if (clears_bank(exchange.epoch()))", "if (false)"),
    _mutant("the other bank is cleared", PACKETS, "clear_bank(exchange.view(), exchange.epoch());",
            "clear_bank(exchange.view(), exchange.epoch() + 1);"),
    _mutant("banks are cleared of some packets", PACKETS,
            "packets_per_source * view.num_ranks", "packets_per_source", seeds=120),
    # --- the plan ----------------------------------------------------------------------------------
    _removed("warp_sync before the tables", PLAN, "warp_sync();", "void count() const {"),
    _removed("barrier after counting", PLAN, "c_.warps.sync();", "count();\n"),
    _removed("barrier after the sums", PLAN, "c_.warps.sync();", "sum_up();\n"),
    _removed("barrier after the starts (low latency)", PLAN, "c_.warps.sync();", "layout_.find_starts();\n"),
    _removed("barrier after the rows", PLAN, "c_.warps.sync();", "hand_out_rows();\n"),
    _removed("warp_sync before a cursor moves", PLAN, "warp_sync();", "row = c_.clip("),
    _removed("warp_sync after the cursors", PLAN, "warp_sync();", "start_of(row_bin) + cursor;"),
    _mutant("all blocks report all", PLAN, "first, run % static_cast<i32>(num_blocks()) =="
            " static_cast<i32>(block_id()));", "first, true);"),
    _mutant("a warp's count is left out", PLAN, "for (u32 warp = 0;", "for (u32 warp = 1;"),
    _removed("totals of earlier sources", PLAN, "note_totals_before(selected, counted);"),
    _mutant("tokens of an inactive rank are waited for", PLAN,
            "if (!is_active(c_.exchange.view(), source)) return {source, token, -1};", "",
            seeds=120),
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
            "count_bits(leaders & lanes_below(lane_id()))"),
    _mutant("the rank's own sum is left out", COMBINE, "own.count() > 0);", "false);"),
    _mutant("some ranks' sums are left out", COMBINE, "place < num_sources; ++place",
            "place < num_sources; place += 2"),
    # --- what must not be noticed ------------------------------------------------------------------
    _mutant("low latency, more barriers", ROWS, "warp_sync();", "warp_sync(); warp_sync();",
            harmless=True, seeds=25),
    _mutant("low latency, all calls are cleared up", CORE,
            "return epoch % kClearBankEvery < uint32_t{kLowLatencyBanks};", "return true;",
            harmless=True, seeds=25),
]  # fmt: skip
