# SPDX-License-Identifier: Apache-2.0
"""The mutants of `mutants.py` that are edits of the low-latency kernels between domains."""

import functools

from mutant import Mutant

KERNELS = "csrc/kernels/low_latency/"
CORE = "csrc/core/low_latency_protocol.h"
FAR = KERNELS + "far_ranks.h"
FAR_DISPATCH = KERNELS + "far_dispatch.h"
FAR_COMBINE = KERNELS + "far_combine.h"
PLAN = KERNELS + "routing_plan.h"
ROWS = KERNELS + "dispatch_rows.h"
DISPATCH = KERNELS + "dispatch_kernel.h"
COMBINE = KERNELS + "combine_kernel.h"

_mutant = functools.partial(Mutant, low_latency=True, internode=True)


def _removed(name: str, path: str, old: str, after: str = "", **more: int) -> Mutant:
    return _mutant(f"far: no {name}", path, old, "", after, **more)


INTERNODE_LOW_LATENCY_MUTANTS = [
    # --- words -----------------------------------------------------------------------------------
    _removed("end that the host is told of", FAR, "put_end(exchange_, network_);"),
    _removed("acquired", FAR, "transport_.acquired(word);"),
    _mutant("far: waits of gpu scope", FAR, "wait_until<Scope::kSys>", "wait_until<Scope::kGpu>"),
    _mutant("far: any exchange's message will do", FAR, "value != 0 && epoch_of(value) == epoch",
            "value != 0"),
    _mutant("far: the message before will do", FAR, "epoch_of(value) == epoch;",
            "epoch_of(value) + 2 >= epoch;"),
    _mutant("far: one bank", CORE, "return epoch % uint32_t{kFarBanks};", "return 0;"),
    _mutant("far: one word for all messages", FAR, "* layout().far_messages + message;",
            "* layout().far_messages;"),
    _mutant("far: one word for all ranks", FAR, "(i64{bank_} * num_ranks_ + rank)",
            "(i64{bank_} * num_ranks_)"),
    _removed("note of what was said last", FAR, "st(last, signal.after);"),
    _mutant("far: words may be as old as their numbers", FAR,
            "clears_bank(exchange_.epoch()) ? layout().low_latency_tokens : num_tokens_;",
            "num_tokens_;", seeds=120),
    _removed("warp_sync before a message", FAR, "warp_sync();", "void send(i32 rank"),
    # --- who waits for what ----------------------------------------------------------------------
    _removed("wait for the first messages", PLAN,
             "far_.wait_first(static_cast<i32>(c_.warps.warp()), "
             "static_cast<i32>(c_.warps.count()));"),
    _removed("barrier after the first messages", PLAN, "c_.warps.sync();", "far_.wait_first("),
    _removed("wait for rows", FAR_DISPATCH,
             "if (lane_id() == 0) far_.wait(source, 1 + chunk);"),
    _removed("wait for sums", FAR_COMBINE,
             "if (lane_id() == 0) far_.wait(source, 1 + chunk);"),
    _removed("warp_sync after a wait for rows", FAR_DISPATCH, "warp_sync();",
             "far_.wait(source, 1 + chunk);"),
    _removed("warp_sync after a wait for sums", FAR_COMBINE, "warp_sync();",
             "far_.wait(source, 1 + chunk);"),
    _removed("wait for messages that nobody reads (dispatch)", DISPATCH,
             "if constexpr (Far::kAny) far_.wait_all(plan_.warp, plan_.num_warps);"),
    _removed("wait for messages that nobody reads (combine)", COMBINE,
             "if constexpr (Far::kAny) far_.wait_all(this_warp(), num_warps());"),
    _mutant("far: one message is not waited for", FAR, "wait_some(1 + num_chunks(),",
            "wait_some(num_chunks(),"),
    _mutant("far: one rank is not waited for", FAR, "const i32 waits = count() * messages;",
            "const i32 waits = count() * messages - 1;"),
    _removed("first message (combine)", FAR_COMBINE,
             "if (lane_id() == 0) far_.announce(owner);"),
    _mutant("far: messages without rows are not sent", FAR_DISPATCH,
            "far_.send(rank, 1 + chunk,", "if (tokens.count() > 0) far_.send(rank, 1 + chunk,"),
    _mutant("far: messages without sums are not sent", FAR_COMBINE,
            "far_.send(owner, 1 + chunk,", "if (tokens.count() > 0) far_.send(owner, 1 + chunk,"),
    # --- what is where ---------------------------------------------------------------------------
    _mutant("far: one place for all ranks", FAR, "i64{bank_} * count() + far_rank;",
            "i64{bank_} * count();"),
    _mutant("far: one place for both banks", FAR, "i64{bank_} * count() + far_rank;", "far_rank;"),
    _mutant("far: messages lie closer than they are long", FAR,
            "(message - 1) * layout().far_chunk_bytes", "(message - 1) * 16"),
    _mutant("far: rows lie where the routing is", FAR, "layout().far_routing_bytes + (message",
            "(message"),
    _mutant("far: places as the sender counts them", FAR,
            "offset_of(far_index(exchange_.view().rank, domain), message)",
            "offset_of(far_index(exchange_.view().rank, first_neighbor_), message)"),
    _mutant("far: rows are not packed (sent)", FAR_DISPATCH, "tokens.position(i)", "i"),
    _mutant("far: rows are not packed (received)", FAR_DISPATCH,
            "read_header(message).position(index)", "index"),
    _mutant("far: sums are not packed", FAR_COMBINE, "tokens.position(index)", "index"),
    _mutant("far: the last row does not travel", FAR_DISPATCH, "layout.bytes(tokens.count())",
            "layout.row(tokens.count() > 0 ? tokens.count() - 1 : 0)"),
    _mutant("far: the last segment does not travel", ROWS,
            "return packed_before(last) + 4 * i64{staged_words(segments_.size(last, hidden_))};",
            "return last > 0 ? packed_before(last) : packed_before(1);"),
    _mutant("far: segments lie one above the other", ROWS,
            "return i64{segment} * (4 * staged_words(segments_.num_elements));", "return 0;"),
    _mutant("far: scalars lie where experts are", FAR_DISPATCH, "to + (experts + i)", "to + i"),
    _mutant("far: scalars are looked for where experts are", PLAN,
            "behind + i / static_cast<u32>(kScalarsPerPacket)",
            "i / static_cast<u32>(kScalarsPerPacket)"),
    _mutant("far: a chunk begins a token late", FAR,
            "return i64{chunk} * layout().far_chunk_tokens;",
            "return i64{chunk} * layout().far_chunk_tokens + (chunk > 0);"),
    # --- who sends what --------------------------------------------------------------------------
    _mutant("far: rows for other domains are stored to them", ROWS,
            "sends && is_neighbor(view_, selections.dest())", "sends"),
    _mutant("far: rows of a token's first selection alone", FAR_DISPATCH,
            "k < op_.shape.num_topk; ++k", "k < 1; ++k", "bool wants("),
    _mutant("far: sums of a token's first row alone", FAR_COMBINE, "i < max_rows; ++i",
            "i < 1; ++i", harmless=True, seeds=15),  # rows are ascending, and then -1
    # --- sums ------------------------------------------------------------------------------------
    _mutant("far: a domain's sum is not rounded", FAR_COMBINE,
            "RowType::unpack(RowType::pack(sum), rounded);",
            "for (int e = 0; e < RowType::kPerWord; ++e) rounded[e] = sum[e];", seeds=120),
    _mutant("far: sums over all ranks in one level", FAR_COMBINE,
            "if (domain_ >= 0 && domain != domain_) add(sums);", "", seeds=120),
    _mutant("far: the last domain's sum is all", FAR_COMBINE,
            "total_[i][c * RowType::kPerWord + e] += rounded[e];",
            "total_[i][c * RowType::kPerWord + e] = rounded[e];"),
    _mutant("far: a domain's sum goes on with that of the one before", FAR_COMBINE,
            "sum[e] = 0.0F;", ""),
    # --- what must not be noticed ----------------------------------------------------------------
    _mutant("far: all ranks in the same order", FAR, "(turn % num_neighbors_ + own)",
            "(turn % num_neighbors_)", harmless=True, seeds=15),
    _mutant("far: all messages are waited for twice", FAR, "warp_sync();",
            "for (i32 i = warp * kLanes + static_cast<i32>(lane_id()); i < waits; "
            "i += num_warps * kLanes) wait(at_turn(i % count()), i / count());\n    warp_sync();",
            "const i32 waits", harmless=True, seeds=15),
]  # fmt: skip
