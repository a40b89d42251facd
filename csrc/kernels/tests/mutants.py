# SPDX-License-Identifier: Apache-2.0
"""Mutation tests: the simulator must notice every weakening of the kernels.

Each mutant is one edit of one header. It is compiled, and random scenarios are run on it until one
fails. A mutant that survives all its seeds is either dead code or a hole in the simulator's model.

    python csrc/kernels/tests/mutants.py --build build/csrc/plain [--only TEXT] [--jobs 2]
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[3]
SOURCES = "csrc/testing/simulated_{}.cc"
DEVICE = "csrc/device/"
KERNELS = "csrc/kernels/high_throughput/"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One edit.

    Attributes:
        name: what it takes away.
        path: of the header.
        old: text that occurs in it; the first occurrence after `after` is replaced.
        new: what it becomes.
        after: text before the position, if `old` occurs more than once.
        seeds: within how many scenarios it must be caught.
        harmless: the edit changes nothing that matters: no scenario may fail.
        mishaps: it is caught by scenarios in which something goes wrong, not by random ones.
    """

    name: str
    path: str
    old: str
    new: str
    after: str = ""
    seeds: int = 40
    harmless: bool = False
    mishaps: bool = False


def _removed(name: str, path: str, old: str, after: str = "", **more: int) -> Mutant:
    return Mutant(f"no {name}", path, old, "", after, **more)


_EXCHANGE = DEVICE + "exchange.h"
_PEERS = DEVICE + "peers.h"
_WAIT = DEVICE + "wait.h"
_RING = DEVICE + "segment_ring.h"
_SUM = DEVICE + "row_sum.h"
_QUEUE = DEVICE + "work_queue.h"
_QUANTIZE = DEVICE + "quantize.h"
_PARTS = DEVICE + "chunk_parts.h"
_PLAN = KERNELS + "plan_kernel.h"
_PLAN_CONTEXT = KERNELS + "plan_context.h"
_PLAN_COUNT = KERNELS + "plan_count.h"
_PLAN_ASSIGN = KERNELS + "plan_assign.h"
_PLAN_EXPERT = KERNELS + "plan_expert_layout.h"
_PLAN_RANK = KERNELS + "plan_rank_layout.h"
_PLAN_STEPS = KERNELS + "plan_steps.h"
_PLAN_DISPATCH = KERNELS + "plan_dispatch_kernel.h"
_PLAN_DISPATCH_CONFIG = KERNELS + "plan_dispatch_config.h"
_SELECTIONS = DEVICE + "token_selections.h"
_DISPATCH = KERNELS + "dispatch_kernel.h"
_SENDER = KERNELS + "dispatch_sender.h"
_RECEIVER = KERNELS + "dispatch_receiver.h"
_CONTEXT = KERNELS + "dispatch_context.h"
_PRODUCTS = KERNELS + "dispatch_products.h"
_COMBINE = KERNELS + "combine_kernel.h"
_COMBINE_EXPERT = KERNELS + "combine_expert_layout.h"
_COMBINE_RANK = KERNELS + "combine_rank_layout.h"

MUTANTS = [
    # --- flags -----------------------------------------------------------------------------------
    Mutant("arrived: release -> relaxed", _PEERS, "st_release", "st_relaxed", "RELEASE(arrived): pub"),
    Mutant("arrived: sys -> gpu", _PEERS, "st_release<Scope::kSys>", "st_release<Scope::kGpu>",
           "RELEASE(arrived): pub"),
    Mutant("every wait: acquire -> relaxed", _WAIT, "ld_acquire<kScope>(word)",
           "ld_relaxed<kScope>(word)"),
    Mutant("arrived: acquire of gpu scope", _EXCHANGE, "wait_until<Scope::kSys>",
           "wait_until<Scope::kGpu>", "ACQUIRE(arrived)"),
    Mutant("acknowledged: release -> relaxed", _PEERS, "st_release", "st_relaxed",
           "RELEASE(acknowledged)"),
    Mutant("acknowledged: acquire of gpu scope", _EXCHANGE, "wait_until_reached<Scope::kSys>",
           "wait_until_reached<Scope::kGpu>", "ACQUIRE(acknowledged)"),
    Mutant("arrived: stale epoch", _EXCHANGE, "epoch_of(word) == epoch;",
           "epoch_of(word) + 1 >= epoch;"),
    Mutant("arrived: what is there before the first use counts", _EXCHANGE, "word != 0 && ", ""),
    Mutant("acknowledged: stale epoch", _EXCHANGE, "peer, epoch_ - 1", "peer, epoch_ - 2"),
    Mutant("acknowledged: waits for no peer", _EXCHANGE, "[this](i32 peer) {",
           "[this](i32 peer) { return;", "void wait_until_writable"),
    Mutant("acknowledged: one peer is not waited for", _EXCHANGE, "[this](i32 peer) {",
           "[this](i32 peer) { if (peer + 1 == view_.num_ranks) return;", "void wait_until_writable"),
    Mutant("one peer never hears of a chunk", _EXCHANGE, "[this, flag_idx](i32 peer) {",
           "[this, flag_idx](i32 peer) { if (peer + 1 == view_.num_ranks) return;",
           "void signal_arrived("),
    # --- ranks that take no part -----------------------------------------------------------------
    Mutant("an inactive rank is waited for", _PEERS, "if (is_active(view, peer)) use(peer);", "use(peer);",
           "void share_out_peers", seeds=120),
    Mutant("a work item may be of an inactive rank", _PEERS, "return is_active(view, peer) ? peer : -1;",
           "return peer;", seeds=120),
    Mutant("tokens of an inactive rank count", _PLAN_CONTEXT,
           "has_token(tile, first) && tile.active;", "has_token(tile, first);", seeds=120),
    Mutant("routing of an inactive rank is waited for", _PLAN_COUNT,
           "chunk <= last_chunk && tile.active;",
           "chunk <= last_chunk;", seeds=120),
    Mutant("experts of an inactive rank are selected", _PLAN_CONTEXT,
           "return all_active(exchange.view()) ||",
           "return true ||", seeds=120),
    Mutant("epoch not advanced", _EXCHANGE, "st(control(view_, channel_, ChannelControl::kEpoch), epoch_);", ""),
    Mutant("blocks_done not set back", _EXCHANGE, "st(control(view_, channel_, ChannelControl::kBlocksDone), 0);", ""),
    Mutant("first block to finish acknowledges", _EXCHANGE, "blocks_before + 1 != num_main() + static_cast<u32>(blocks_.num_tail)",
           "blocks_before != 0"),
    Mutant("acknowledged before the rows are read", _DISPATCH, "if (!in_tail && warp_id() < context_.num_senders)",
           "if (thread_id() == 0 && block_id() == 0) "
           "for (i32 p = 0; p < context_.num_ranks; ++p) put_acknowledged("
           "context_.exchange.view(), Channel::kHighThroughput, p, ld(control(context_.exchange.view(), "
           "Channel::kHighThroughput, ChannelControl::kEpoch)) + 1); "
           "if (!in_tail && warp_id() < context_.num_senders)"),
    # --- barriers of the exchange ------------------------------------------------------------------
    _removed("warp_sync after waiting to write", _EXCHANGE, "warp_sync();", '"acknowledged");'),
    _removed("warp_sync before arrived", _EXCHANGE, "warp_sync();", "void signal_arrived("),
    _removed("warp_sync before arrived at owner", _EXCHANGE, "warp_sync();", "void signal_arrived_at("),
    _removed("block_sync before blocks_done", _EXCHANGE, "block_sync();", "void finish()"),
    _removed("warp_sync before acknowledged", _EXCHANGE, "warp_sync();",
             "if (blocks_before + 1 != num_main() + static_cast<u32>(blocks_.num_tail)) return;"),
    _removed("barrier before the grid barrier", _EXCHANGE, "warps.sync();", "void grid_barrier("),
    _removed("barrier after the grid barrier", _EXCHANGE, "warps.sync();", '"grid barrier");'),
    Mutant("grid barrier: release -> relaxed", _EXCHANGE, "st_release<Scope::kGpu>(generation",
           "st_relaxed<Scope::kGpu>(generation"),
    Mutant("grid barrier: the last block does not wait for all", _EXCHANGE,
           "fetch_add_acq_rel<Scope::kGpu>(count, 1) + 1 == num_main()",
           "fetch_add_acq_rel<Scope::kGpu>(count, 1) + 2 >= num_main()"),
    # --- what goes wrong -----------------------------------------------------------------------------
    Mutant("peers are not told", _WAIT, "if (tag != WaitTag::kPeerGaveUp) {", "if (false) {",
           mishaps=True),
    Mutant("one peer is not told", _WAIT, "put_aborted(view, other, word);",
           "if (other + 1 < view.num_ranks) put_aborted(view, other, word);", mishaps=True),
    Mutant("nobody looks whether a peer gave up", _WAIT, "if (word != 0) {", "if (false) {",
           mishaps=True),
    Mutant("another rank is blamed", _WAIT, ".blamed = static_cast<u32>(peer)",
           ".blamed = static_cast<u32>(view.rank)", mishaps=True),
    Mutant("the record is not published", _WAIT, "st_release<Scope::kSys>(record, 1);", "",
           mishaps=True),
    Mutant("a deadline never passes", _WAIT, "return waited > timeout ?",
           "return false ?", mishaps=True),
    Mutant("a deadline passes at once", _WAIT, "return waited > timeout ?",
           "return true ?"),
    Mutant("it does not poll once more after the deadline", _WAIT,
           "level = look(view, context, start, level & ~kOverdue);",
           "if ((level = look(view, context, start, level)) & kOverdue) "
           "give_up(view, context, static_cast<u32>(seen));", mishaps=True),
    Mutant("a clock must not step back", _WAIT, "static_cast<i64>(now_ns() - start)",
           "now_ns() - start"),
    Mutant("nobody who waits looks whether the group is closed", _WAIT,
           "if (ld_relaxed<Scope::kSys>(control(view, Control::kClosed)) != 0)", "if (false)", mishaps=True),
    Mutant("the rank is not checked", _EXCHANGE, "if (rank != view.rank)", "if (false)", mishaps=True),
    Mutant("one thread checks the rank", _EXCHANGE, "if (rank != view.rank)",
           "if (block_id() == 0 && thread_id() == 0 && rank != view.rank)", mishaps=True),
    Mutant("long waits are not reported", _WAIT, "level < kMaxLevel && waited",
           "false && waited", mishaps=True),
    Mutant("the end of a long wait is not reported", _WAIT, "if (level != 0) report", "if (false) report",
           mishaps=True),
    Mutant("the report is of another exchange", _WAIT, "LongWait{.epoch = context.expected",
           "LongWait{.epoch = context.expected - 1", mishaps=True),
    Mutant("another operation is not noticed", _EXCHANGE, "if (seen != own_flag())", "if (false)",
           mishaps=True),
    Mutant("the call is not in the flag", _EXCHANGE, "arrival_flag(epoch_, op_, call_tag_)",
           "arrival_flag(epoch_, op_, 0)", mishaps=True),
    Mutant("the operation is not in the flag", _EXCHANGE, "arrival_flag(epoch_, op_, call_tag_)",
           "arrival_flag(epoch_, OpKind::kPlan, call_tag_)", mishaps=True),
    Mutant("two at once are not noticed", _EXCHANGE, "if (running != 0)", "if (false)",
           "void check_alone()", seeds=60, mishaps=True),
    Mutant("a closed group's kernel runs (plan)", _PLAN,
           "if (context_.exchange.closed()) return leave_no_results();", "", mishaps=True),
    Mutant("a closed group's kernel runs (dispatch)", _DISPATCH,
           "if (context_.exchange.closed()) {", "if (false) {", mishaps=True),
    Mutant("a closed group's tail alone leaves no results", _DISPATCH,
           "if (!in_tail) leave_no_results();",
           "if (in_tail) leave_no_results();", mishaps=True),
    Mutant("a closed group's kernel runs (plan_dispatch)", _PLAN_DISPATCH,
           "if (exchange_.closed()) {", "if (false) {", mishaps=True),
    Mutant("a closed group's kernel leaves the plan as it is", _PLAN_DISPATCH,
           "PlanAssigner<RowLayout>(plan).poison_results();", "", mishaps=True),
    Mutant("a closed group's kernel leaves the rows as they are", _PLAN_DISPATCH,
           "DispatchReceiver<Config, RowType>(dispatch_).poison_results();", "", mishaps=True),
    Mutant("a closed group's kernel runs (combine)", _COMBINE,
           "if (c_.exchange.closed()) return leave_no_results();", "", mishaps=True),
    Mutant("a closed group's kernel says nothing", _EXCHANGE,
           "write_record(view_, {WaitTag::kClosed", "if (false) write_record(view_, {WaitTag::kClosed",
           mishaps=True),
    Mutant("a closed group's kernel leaves results as they are", _EXCHANGE,
           "for (i64 i = i64{block_of_call()}", "for (i64 i = count + i64{block_of_call()}", mishaps=True),
    Mutant("rows of a handle from elsewhere may have holes", _COMBINE_EXPERT,
           "count_bits(holders & lanes_below(lane_id()))", "lane_id()", mishaps=True),
    Mutant("selections of a handle from elsewhere may be equal", _COMBINE_RANK,
           "other < local || earlier", "other < local", mishaps=True),
    Mutant("rows of a handle from elsewhere are not bounded", _SELECTIONS,
           "return row < shape.recv_capacity ? row : -1;", "return row;", mishaps=True),
    Mutant("experts of a handle from elsewhere are not bounded", _SELECTIONS,
           "expert_ < shape.num_experts &&", "", mishaps=True),
    # --- the segment ring --------------------------------------------------------------------------
    _removed("wait before a stage is loaded again", _RING, "bulk_wait_read<1>();"),
    Mutant("waits for too few reads", _RING, "bulk_wait_read<1>();", "bulk_wait_read<2>();"),
    _removed("warp_sync before a stage is loaded again", _RING, "warp_sync();", "bulk_wait_read<1>();"),
    _removed("wait for a load", _RING,
             "mbar_wait(&stages_.loaded[stage], uses_ / Stages::kStages % 2);"),
    Mutant("parity of a load not flipped", _RING, "uses_ / Stages::kStages % 2", "0"),
    Mutant("loads run one stage too far ahead", _RING, "kAhead = Stages::kStages - 2",
           "kAhead = Stages::kStages - 1"),
    Mutant("expects too few bytes", _RING, "stage], source.bytes);", "stage], source.bytes - 16);"),
    _removed("fence after mbarriers are made", _RING, "mbar_init_fence();"),
    # --- the FP8 wire ------------------------------------------------------------------------------
    _removed("warp_sync before quantized values overwrite", _QUANTIZE, "warp_sync();",
             "load(first + kBlocks * kVectorsPerBlock);"),
    Mutant("scales not filled up to 16 bytes", _QUANTIZE, "align_up(ceil_div(num_elements, kScaleBlock), 4)",
           "ceil_div(num_elements, kScaleBlock)"),
    _removed("proxy fence after quantizing", _QUANTIZE,
             "fence_proxy_async_shared();  // the copy engines see what the lanes wrote"),
    _removed("warp_sync after quantizing", _QUANTIZE, "warp_sync();",
             "the copy engines see what the lanes wrote"),
    _removed("warp_sync before restored values overwrite", _QUANTIZE, "warp_sync();",
             "v / kLanesPerBlock % kWarpSize));"),
    _removed("proxy fence after restoring", _QUANTIZE, "fence_proxy_async_shared();", "st(as<Vec16>(stage) + v"),
    _removed("warp_sync after restoring", _QUANTIZE, "warp_sync();", "st(as<Vec16>(stage) + v"),
    # --- dispatch ----------------------------------------------------------------------------------
    _removed("wait for bulk stores before arrived", _SENDER, "bulk_wait<0>();",
             "before the chunk is said to be."),
    Mutant("bulk stores only read before arrived", _SENDER, "bulk_wait<0>();",
           "bulk_wait_read<0>();", "before the chunk is said to be."),
    _removed("wait for bulk stores at the end", _DISPATCH, "bulk_wait<0>();", "receiver.receive();\n"),
    _removed("wait to write (dispatch)", _SENDER, "c_.exchange.wait_until_writable();"),
    _removed("wait for arrival (dispatch)", _RECEIVER,
             "if (lane_id() == 0) c_.exchange.wait_arrived(source, flag_idx);"),
    _removed("warp_sync after arrival (dispatch)", _RECEIVER, "warp_sync();",
             "exchange.wait_arrived(source, flag_idx);"),
    _removed("proxy fence after arrival", _RECEIVER, "fence_proxy_async_global();"),
    Mutant("proxy fence after arrival of the other memory", _RECEIVER, "fence_proxy_async_global();",
           "fence_proxy_async_shared();"),
    Mutant("announced before it is written", _SENDER, "bulk_wait<kAnnouncedAfter>();",
           "bulk_wait<kAnnouncedAfter + 1>();"),
    _removed("wait before a chunk is announced late", _SENDER, "bulk_wait<kAnnouncedAfter>();"),
    Mutant("a sent chunk is never announced", _SENDER, "    announce_all();\n  }", "  }"),
    Mutant("early flag (dispatch)", _SENDER, "const i32 flag_idx = work.item();",
           "const i32 flag_idx = work.item(); c_.exchange.signal_arrived(flag_idx);", "void send()"),
    Mutant("wrong destination of rows", _PEERS, "return staged_row(view, peer, view.rank, token);",
           "return staged_row(view, peer, peer, token);"),
    Mutant("wrong chunk awaited", _RECEIVER, "exchange.wait_arrived(source, flag_idx)",
           "exchange.wait_arrived(source, flag_idx > 0 ? flag_idx - 1 : 0)"),
    Mutant("wrong slot", _SELECTIONS, "(1U << lane) - 1",
           "(2U << lane) - 1"),
    # --- products of dispatch ----------------------------------------------------------------------
    _removed("start of a dot product anew", _PRODUCTS, "if (segment == 0) dot_ = 0.0F;"),
    Mutant("a dot product is summed by several warps", _CONTEXT, "bulk && !with_dots(),", "bulk,",
           seeds=120),
    Mutant("a dot product is written before its last segment", _PRODUCTS,
           "segment + 1 == c_.segments.count", "segment == 0", seeds=120),
    Mutant("a dot product of another lane's row goes on", _PRODUCTS,
           "if (lane_id() == lane) dot_ = dot;", "dot_ = dot;", seeds=120),
    Mutant("neighboring sums are added in another order", _PRODUCTS,
           "u32 distance = 1; distance < kWarpSize; distance *= 2",
           "u32 distance = kWarpSize / 2; distance > 0; distance /= 2"),
    Mutant("segments of any size for dot products", _CONTEXT,
           "if (Config::kProducts) return static_cast<i32>(kDotBlock);", "", seeds=120),
    Mutant("rows that are multiplied go out as they came, too", _RECEIVER,
           "row < 0 || c_.weighted()", "row < 0"),
    Mutant("elements that are multiplied go out as they came, too", _RECEIVER,
           "} else if (!c_.weighted()) {", "} else {", seeds=120),
    _removed("dot products of rows without token", _RECEIVER,
             "if (c_.with_dots() && lane_id() == 0) st(Ptr<float>{c_.op.row_dots} + row, 0.0F);"),
    Mutant("dot products of rows that do not travel", _RECEIVER,
           "c_.hidden == 0 && !c_.with_dots()", "c_.hidden == 0", seeds=120),
    Mutant("a closed group leaves its dot products alone", _RECEIVER, "    if (c_.with_dots()) {",
           "    if (false) {", "void poison_results()", mishaps=True),
    # --- combine -----------------------------------------------------------------------------------
    _removed("wait to write (combine)", _COMBINE, "c_.exchange.wait_until_writable();"),
    _removed("warp_sync after arrival (combine)", _COMBINE, "warp_sync();",
             "c_.exchange.wait_arrived(source, flag_idx);"),
    _removed("wait for a term", _SUM, "async_wait<kStages - 1>();", "void exchange("),
    Mutant("waits for all terms but one more", _SUM, "async_wait<kStages - 1>();",
           "async_wait<kStages>();", "void exchange("),
    Mutant("waits for all terms but one more, outside of the loop", _SUM,
           "async_wait<kStages - 1>();", "async_wait<kStages>();"),
    _removed("wait for a term in a ring that is not full", _SUM, "async_wait<0>();"),
    Mutant("one load too many", _SUM, "loads_ - uses_ == kStages", "loads_ - uses_ == kStages + 1"),
    Mutant("loads that are nothing are forgotten", _SUM, "    ++loads_;\n    async_commit();",
           "    ++loads_;"),
    _removed("start of the ring anew", _SUM, "ring_.restart();"),
    Mutant("a row with several weights is added once", _SUM,
           "ring_.is_full() && terms.weights_per_row() == 1", "ring_.is_full()", seeds=120),
    Mutant("a load is started after the last", _SUM, "if (loads) load_vectors(", "load_vectors("),
    Mutant("a place is loaded again before it is read", _SUM,
           "for (int v = 0; v < kVectors; ++v) row[v] = ld(at + v * kLanes);",
           "if (loads) load_vectors(at, from + lane_id(), std::make_integer_sequence<int, kVectors>());"
           " for (int v = 0; v < kVectors; ++v) row[v] = ld(at + v * kLanes);"),
    Mutant("lanes load more than the segment has", _SUM,
           "v * kLanes < spare ? v * kLanes : spare", "v * kLanes"),
    Mutant("the last segment is loaded as if it were full", _SUM,
           "last_segment_ - static_cast<i32>(has_last)", "last_segment_"),
    Mutant("a rank's own sum is not rounded", _SUM, "own = RowType::to_float(RowType::from_float(sum));",
           "own = sum;"),
    Mutant("a rank's own sum comes first", _SUM, "if (kHasOthers && term == terms.own_sum_at()) {",
           "if (kHasOthers && term == terms.own()) {"),
    Mutant("waits for all ranks but one (combine)", _COMBINE, "c_.exchange.wait_arrived(source, flag_idx);",
           "if (source + 1 < c_.num_ranks) c_.exchange.wait_arrived(source, flag_idx);"),
    Mutant("early flag (combine)", _COMBINE, "if (owner < 0) continue;",
           "if (owner < 0) continue; c_.exchange.signal_arrived_at(owner, flag_idx);", "void send()"),
    Mutant("ranks summed in another order", _COMBINE, "other < selections.dest()",
           "other > selections.dest()"),
    Mutant("a row of several selections counts once", _COMBINE_RANK,
           "terms.set(terms.own(), count > 0 ? count : 1);", "terms.set(terms.own(), 1);"),
    Mutant("a selection's scalar is that of another", _COMBINE_EXPERT,
           "return selections.position(c_.num_topk);", "return lane_id();"),
    Mutant("scalars of this rank are those of another selection", _COMBINE_RANK,
           "i64{selections.slot()} * c_.num_topk + lane_id();", "i64{selections.slot()} * c_.num_topk;"),
    # --- chunks and parts ----------------------------------------------------------------------------
    Mutant("the last token of a chunk is left out", _PARTS, "return last < num_tokens ? last : num_tokens;",
           "return last < num_tokens ? last : num_tokens - 1;"),
    Mutant("the last segment of a part is left out", _PARTS, ".last_segment = first_segment(part + 1),",
           ".last_segment = first_segment(part + 1) - static_cast<i32>(per_chunk > 1),", seeds=120),
    Mutant("scalars go with no part", _PARTS, ".has_scalars = part == 0", ".has_scalars = part == 1"),
    # --- tickets -------------------------------------------------------------------------------------
    Mutant("a ticket is left out", _QUEUE, "(tickets_, 1);", "(tickets_, 2);"),
    Mutant("two warps have one item", _QUEUE, "item_ = num_places_ + ", "item_ = num_places_ - 1 + "),
    Mutant("tickets not set back", _EXCHANGE,
           "st(control(view_, channel_, ChannelControl::kSendTickets), 0);", ""),
    Mutant("receivers' tickets not set back", _EXCHANGE,
           "st(control(view_, channel_, ChannelControl::kReceiveTickets), 0);", ""),
    # --- the tail ----------------------------------------------------------------------------------
    Mutant("acknowledged before the tail has read", _EXCHANGE,
           "num_main() + static_cast<u32>(blocks_.num_tail)", "num_main()"),
    Mutant("the tail sends", _DISPATCH, "if (!in_tail && warp_id()", "if (warp_id()"),
    Mutant("the tail has places", _EXCHANGE, "in_tail() || warp_id()", "warp_id()"),
    Mutant("the tail does not wait for what has been sent", _RECEIVER, "if (lane_id() == 0) c_.exchange",
           "if (lane_id() == 0 && !c_.exchange.in_tail()) c_.exchange"),
    Mutant("rows without a token are left to a tail that does not clear them", _RECEIVER,
           "(has_tail ? num_clear_runs() : 0)", "0"),
    Mutant("the last token of a chunk is left out", _RECEIVER, "token >= part.last_token",
           "token + 1 >= part.last_token"),
    Mutant("warps that have sent are not set back", _EXCHANGE,
           "st(control(view_, channel_, ChannelControl::kSendersDone), 0);", ""),
    Mutant("one peer is never told that all is sent", _EXCHANGE, "[this](i32 peer) { put_sent",
           "[this](i32 peer) { if (peer + 1 != view_.num_ranks) put_sent"),
    Mutant("a rank tells nobody that all is sent", _EXCHANGE, "num_main() * num_senders) return;",
           "num_main() * num_senders + 1) return;"),
    # --- plan --------------------------------------------------------------------------------------
    _removed("wait to write (plan)", _PLAN_COUNT, "c_.exchange.wait_until_writable();"),
    Mutant("a tile does not wait for its last chunk", _PLAN_COUNT, "chunk <= last_chunk", "chunk < last_chunk"),
    _removed("warp_sync after arrival (plan)", _PLAN_COUNT, "warp_sync();",
             "exchange.wait_arrived(tile.source, chunk);\n    }"),
    _removed("warp_sync after advancing", _PLAN_CONTEXT, "warp_sync();", "count_bits(counted.lanes);\n    }"),
    _removed("warp_sync after loading cursors", _PLAN_ASSIGN, "warp_sync();", "load_cursors(item, own);"),
    _removed("warp_sync before advancing (assign)", _PLAN_ASSIGN, "warp_sync();  // all rows are read before a cursor moves"),
    Mutant("a token's own selections counted before it", _PLAN_ASSIGN,
           "counted.lanes & lanes_below(c_.first_lane)", "counted.lanes & lanes_below(lane_id() + 1)"),
    Mutant("repeated experts take part", _PLAN_CONTEXT, "expert < 0 || repeats ?", "expert < 0 ?"),
    Mutant("experts that do not exist take part", _PLAN_CONTEXT, "is_expert(expert) ? expert : -1",
           "expert >= -1 ? expert : -1"),
    _removed("grid barrier before the scan", _PLAN_STEPS,
             "context.exchange.grid_barrier(context.warps);", "counter.count();"),
    _removed("grid barrier after the scan", _PLAN_STEPS,
             "context.exchange.grid_barrier(context.warps);", "counter.scan();"),
    _removed("barrier after the starts", _PLAN_ASSIGN, "c_.warps.sync();", "find_starts();"),
    Mutant("the end of an expert's rows is not aligned", _PLAN_EXPERT,
           "aligned(ld(c_.totals() + expert))", "ld(c_.totals() + expert)"),
    Mutant("a token counts at a rank as often as it selects experts there", _PLAN_RANK,
           "lanes_alike(static_cast<u32>(bin + 1), c_.bin_bits)", "selection.same_expert"),
    # --- a plan in its dispatch ------------------------------------------------------------------
    _removed("wait for the plan", _PLAN_DISPATCH, "exchange_.wait_planned();"),
    Mutant("who has sent does not wait for the plan", _PLAN_DISPATCH, "exchange_.wait_planned();",
           "if (warp_id() >= dispatch_.num_senders) exchange_.wait_planned();"),
    Mutant("who has made its part does not wait for the plan", _PLAN_DISPATCH,
           "exchange_.wait_planned();",
           "if (warp_id() < dispatch_.num_senders) exchange_.wait_planned();"),
    _removed("warp_sync after waiting for the plan", _EXCHANGE, "warp_sync();", '"planned");\n    }'),
    _removed("barrier before the plan is announced", _EXCHANGE, "warps.sync();",
             "void announce_plan("),
    Mutant("planned: release -> relaxed", _EXCHANGE, "st_release<Scope::kGpu>(", "st_relaxed<Scope::kGpu>(",
           "RELEASE(planned)"),
    Mutant("planned: blocks come relaxed", _EXCHANGE, "fetch_add_acq_rel<Scope::kGpu>(count, 1)",
           "fetch_add_relaxed<Scope::kGpu>(count, 1)", "RELEASE(planned)"),
    Mutant("the first block announces the plan", _EXCHANGE, "+ 1 != num_main()) return;",
           "!= 0) return;", "RELEASE(planned)"),
    Mutant("blocks that made the plan are not forgotten", _EXCHANGE, "st_relaxed<Scope::kGpu>(count, 0);",
           "", "RELEASE(planned)"),
    Mutant("the plan is not forgotten", _EXCHANGE, "if (op_ == OpKind::kPlanDispatch)", "if (false)"),
    Mutant("a plan's barrier is for all warps", DEVICE + "block_warps.h",
           "named_sync(kBarrier, count() * kWarpSize);", "block_sync();"),
    Mutant("the tail does not wait for the plan", _PLAN_DISPATCH, "exchange_.wait_planned();",
           "if (!in_tail) exchange_.wait_planned();"),
    Mutant("the tail makes a plan too", _PLAN_DISPATCH, "} else if (!in_tail) {", "} else {"),
    Mutant("the tail sends (plan_dispatch)", _PLAN_DISPATCH, "if (!in_tail && warp_id()",
           "if (warp_id()"),
    Mutant("rows have the flags of the routing", _PLAN_DISPATCH, "with_flags_from(kRowFlags)",
           "with_flags_from(0)"),
    _removed("proxy fence after the tables", _PLAN_DISPATCH, "fence_proxy_async_shared();"),
    Mutant("proxy fence after the tables of the other memory", _PLAN_DISPATCH,
           "fence_proxy_async_shared();", "fence_proxy_async_global();"),
    Mutant("tables lie in a sender's stages", _PLAN_DISPATCH_CONFIG, "words_of(warp_id())",
           "words_of(warp_id() - warps.first())"),
    Mutant("starts lie on cursors", _PLAN_DISPATCH_CONFIG, "words_of(warps.first()) + kMaxBins",
           "words_of(warps.first())"),
    Mutant("starts lie in a sender's stages", _PLAN_DISPATCH_CONFIG,
           "words_of(warps.first()) + kMaxBins", "words_of(0) + kMaxBins"),
    _removed("wait for bulk stores at the end (plan_dispatch)", _PLAN_DISPATCH, "bulk_wait<0>();"),
    Mutant("a plan's warp is left out", DEVICE + "block_warps.h", "return warp_id() - first_;",
           "return warp_id() - first_ + 1;"),
    Mutant("rows go to the owners of repeated experts' lanes", _SELECTIONS,
           "if (lowest_bit(warp_match(static_cast<u32>(expert_))) != lane) dest_ = -1;", ""),
    Mutant("rows go to a rank that takes no part", _SELECTIONS, "if (is_active(view, owner)) dest_",
           "dest_", seeds=120),
    Mutant("rows go to the owners of experts that do not exist", _SELECTIONS,
           "if (expert_ >= 0 && expert_ < shape.num_experts) {", "if (expert_ >= 0) {"),
    Mutant("scalars of an unplanned token lie in the order of its selections", _SELECTIONS,
           "num_earlier(expert_,", "num_earlier(static_cast<i32>(lane_id()),"),
    # --- what must not be noticed --------------------------------------------------------------------
    Mutant("unchanged", _EXCHANGE, "class Exchange", "class Exchange", harmless=True, seeds=25),
    Mutant("release as a fence and a relaxed store", _PEERS, "st_release<Scope::kSys>(",
           "fence_acq_rel<Scope::kSys>(), st_relaxed<Scope::kSys>(", "RELEASE(arrived): pub",
           harmless=True, seeds=25),
    Mutant("more barriers", _SENDER, "c_.exchange.signal_arrived(unannounced_);",
           "warp_sync(); c_.exchange.signal_arrived(unannounced_);", harmless=True, seeds=25),
    Mutant("work items in reverse order (combine)", _COMBINE,
           "const i32 flag_idx = work.item() / num_others;",
           "const i32 flag_idx = c_.parts.count() - 1 - work.item() / num_others;",
           harmless=True, seeds=25),
]  # fmt: skip


def mutate(mutant: Mutant) -> str:
    """The header's text with the edit.

    Raises:
        SystemExit: the text to be replaced is not there any more.
    """
    text = (ROOT / mutant.path).read_text()
    start = text.find(mutant.after)
    at = text.find(mutant.old, start + len(mutant.after)) if start >= 0 else -1
    if at < 0:
        sys.exit(f"mutants: '{mutant.name}' does not fit {mutant.path} any more")
    return text[:at] + mutant.new + text[at + len(mutant.old) :]


def _operations(path: str) -> list[str]:
    """Operations whose kernels include a header, enough to see; "wait" is a kernel that does but that."""
    of_dispatch = (_DISPATCH, _CONTEXT, _SENDER, _RECEIVER, _PRODUCTS, _RING, _QUANTIZE)
    only = dict.fromkeys(of_dispatch, "dispatch")
    plan = (_PLAN, _PLAN_CONTEXT, _PLAN_COUNT, _PLAN_ASSIGN, _PLAN_EXPERT, _PLAN_RANK, _PLAN_STEPS)
    only |= dict.fromkeys(plan, "plan")
    both = (_PLAN_DISPATCH, _PLAN_DISPATCH_CONFIG, DEVICE + "block_warps.h")
    only |= dict.fromkeys(both, "plan_dispatch")
    only |= dict.fromkeys((_COMBINE, _COMBINE_EXPERT, _COMBINE_RANK, _SUM), "combine")
    if path in only:
        return [only[path]]
    return ["plan", "dispatch", "combine", "plan_dispatch"] + ["wait"] * (path == _WAIT)


def _compiler(build: pathlib.Path, source: str) -> list[str]:
    """How the build compiles a file, without its output."""
    entries = json.loads((build / "compile_commands.json").read_text())
    entry = next(e for e in entries if e["file"].endswith(source))
    compiler = shlex.split(entry["command"])
    return compiler[: compiler.index("-o")]


# Read once for all mutants: that is a third of what a compilation takes.
_STANDARD = ("bit", "cstddef", "cstdint", "functional", "limits", "source_location", "utility")
_OPTIONS = ("-Og", "-g0", "-w")


def _precompile(build: pathlib.Path, folder: pathlib.Path) -> None:
    """Makes a header of the standard library's, precompiled with the options of mutants."""
    header = folder / "standard.h"
    header.write_text("".join(f"#include <{name}>\n" for name in _STANDARD))
    command = [*_compiler(build, SOURCES.format("plan")), *_OPTIONS, "-x", "c++-header"]
    subprocess.run([*command, "-o", f"{header}.gch", header], cwd=build, check=True)


def _compile(mutant: Mutant, build: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """`simulate` with the mutant in it."""
    header = folder / mutant.path
    header.parent.mkdir(parents=True)
    header.write_text(mutate(mutant))
    num_items = []
    for operation in _operations(mutant.path):
        source = SOURCES.format(operation)
        compiler = _compiler(build, source)
        num_items.append(str(folder / f"{operation}.o"))
        command = [compiler[0], f"-I{folder}", *compiler[1:], *_OPTIONS]
        command += ["-include", folder.parent / "standard.h"]
        subprocess.run([*command, "-o", num_items[-1], "-c", ROOT / source], cwd=build, check=True)
    program = folder / "simulate"
    main = build / "kernels/tests/CMakeFiles/simulate.dir/simulate.cc.o"
    sanitizers = [flag for flag in compiler if flag.startswith("-fsanitize")]
    libraries = [
        build / path
        for path in (
            "testing/libjax_ep_scenarios.a", "sim/libjax_ep_sim.a",
            "testing/libjax_ep_cpu_testing.a", "libjax_ep_cpu.a", "libjax_ep_core.a",
        )
    ]  # fmt: skip
    link = [compiler[0], "-o", program, main, *num_items, *libraries, "-lpthread", *sanitizers]
    subprocess.run(link, check=True)
    return program


def run(mutant: Mutant, build: pathlib.Path, work: pathlib.Path) -> str | None:
    """What is wrong with the verdict on a mutant; None if it is as it must be."""
    program = _compile(mutant, build, work / re.sub(r"\W+", "_", mutant.name))
    scenarios = ["--mishaps"] if mutant.mishaps else []
    result = subprocess.run(
        [program, *scenarios, "--seeds", f"1:{mutant.seeds}"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    # Killed by a signal: it read outside of its parameters, which are not simulated memory.
    if result.returncode > 1:
        return f"it ended with status {result.returncode}:\n{result.stdout}{result.stderr}"
    caught = result.returncode != 0
    if caught == mutant.harmless:
        return result.stdout if caught else f"not caught within {mutant.seeds} seeds"
    first = re.search(r"^seed (\d+) failed", result.stdout, re.M)
    scenario = re.search(r"^(?!seed)(\w[\w ]*: .*)", result.stdout, re.M)
    verdict = (
        f"seed {first[1]}, {scenario[1] if scenario else '?'}" if first else "passes, as it must"
    )
    if result.returncode < 0:
        verdict = f"ended by signal {-result.returncode}"
    print(f"  {mutant.name}: {verdict}", flush=True)
    return None


def main() -> int:
    """Runs all mutants, or those whose names hold `--only`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=pathlib.Path, required=True, help="build folder of csrc")
    parser.add_argument("--only", default="", help="run those whose names hold this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if arguments.only in mutant.name]
    for mutant in chosen:
        mutate(mutant)  # all of them still fit
    start = time.monotonic()
    build = arguments.build.resolve()
    with (
        tempfile.TemporaryDirectory() as work,
        concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool,
    ):
        _precompile(build, pathlib.Path(work))
        verdicts = list(pool.map(lambda m: run(m, build, pathlib.Path(work)), chosen))
    wrong = [(m, v) for m, v in zip(chosen, verdicts, strict=True) if v is not None]
    for mutant, verdict in wrong:
        print(f"WRONG {mutant.name}: {verdict}")
    harmful = sum(not mutant.harmless for mutant in chosen)
    print(
        f"{len(chosen) - len(wrong)} of {len(chosen)} verdicts are right ({harmful} mutants, "
        f"{len(chosen) - harmful} harmless edits) in {time.monotonic() - start:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
