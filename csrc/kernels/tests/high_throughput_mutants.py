# SPDX-License-Identifier: Apache-2.0
"""The mutants of `mutants.py` that are edits of the high-throughput kernels and of what they use."""

from mutant import DEVICE, Mutant

KERNELS = "csrc/kernels/high_throughput/"


def _removed(name: str, path: str, old: str, after: str = "", **more: int) -> Mutant:
    return Mutant(f"no {name}", path, old, "", after, **more)


EXCHANGE = DEVICE + "exchange.h"
PEERS = DEVICE + "peers.h"
WAIT = DEVICE + "wait.h"
RING = DEVICE + "segment_ring.h"
SUM = DEVICE + "row_sum.h"
PIECE_SUM = DEVICE + "piece_sum.h"
QUEUE = DEVICE + "work_queue.h"
QUANTIZE = DEVICE + "quantize.h"
PARTS = DEVICE + "chunk_parts.h"
CLOSED = "csrc/kernels/closed_results.h"
PLAN = KERNELS + "plan_kernel.h"
PLAN_CONTEXT = KERNELS + "plan_context.h"
PLAN_COUNT = KERNELS + "plan_count.h"
PLAN_ASSIGN = KERNELS + "plan_assign.h"
PLAN_EXPERT = KERNELS + "plan_expert_layout.h"
PLAN_RANK = KERNELS + "plan_rank_layout.h"
PLAN_STEPS = KERNELS + "plan_steps.h"
PLAN_DISPATCH = KERNELS + "plan_dispatch_kernel.h"
PLAN_DISPATCH_BLOCK = KERNELS + "plan_dispatch_block.h"
SELECTIONS = DEVICE + "token_selections.h"
DISPATCH = KERNELS + "dispatch_kernel.h"
SENDER = KERNELS + "dispatch_sender.h"
RECEIVER = KERNELS + "dispatch_receiver.h"
CONTEXT = KERNELS + "dispatch_context.h"
DISPATCH_EXPERT = KERNELS + "dispatch_expert_layout.h"
DISPATCH_RANK = KERNELS + "dispatch_rank_layout.h"
PRODUCTS = KERNELS + "dispatch_products.h"
COMBINE = KERNELS + "combine_kernel.h"
COMBINE_SENDER = KERNELS + "combine_sender.h"
COMBINE_RECEIVER = KERNELS + "combine_receiver.h"
COMBINE_SUMS = KERNELS + "combine_sums.h"
COMBINE_CONTEXT = KERNELS + "combine_context.h"
COMBINE_EXPERT = KERNELS + "combine_expert_layout.h"
COMBINE_RANK = KERNELS + "combine_rank_layout.h"


def high_throughput_operations(mutant: Mutant) -> list[str]:
    """Operations that are compiled with a mutant, enough to see it; "wait" is a kernel that does but that.

    What several kernels include is compiled into the two that compile fastest, or into the one that
    has all of it.
    """
    if mutant.in_plan_dispatch:
        return ["plan_dispatch"]
    path = mutant.path
    of_dispatch = (
        CLOSED,
        DISPATCH,
        CONTEXT,
        DISPATCH_EXPERT,
        DISPATCH_RANK,
        SENDER,
        RECEIVER,
        PRODUCTS,
        RING,
        QUANTIZE,
    )
    only = dict.fromkeys(of_dispatch, "dispatch")
    plan = (
        PLAN,
        PLAN_CONTEXT,
        PLAN_COUNT,
        PLAN_ASSIGN,
        PLAN_EXPERT,
        PLAN_RANK,
        PLAN_STEPS,
    )
    only |= dict.fromkeys(plan, "plan")
    both = (PLAN_DISPATCH, PLAN_DISPATCH_BLOCK, DEVICE + "block_warps.h")
    only |= dict.fromkeys(both, "plan_dispatch")
    of_combine = (
        COMBINE,
        COMBINE_SENDER,
        COMBINE_RECEIVER,
        COMBINE_SUMS,
        COMBINE_CONTEXT,
        COMBINE_EXPERT,
        COMBINE_RANK,
        SUM,
        PIECE_SUM,
    )
    only |= dict.fromkeys(of_combine, "combine")
    if path in only:
        return [only[path]]
    return ["plan", "combine"] + ["wait"] * (path == WAIT)


HIGH_THROUGHPUT_MUTANTS = [
    # --- flags -----------------------------------------------------------------------------------
    Mutant("arrived: release -> relaxed", PEERS, "st_release", "st_relaxed", "RELEASE(arrived): pub"),
    Mutant("arrived: sys -> gpu", PEERS, "st_release<Scope::kSys>", "st_release<Scope::kGpu>",
           "RELEASE(arrived): pub"),
    Mutant("every wait: acquire -> relaxed", WAIT, "ld_acquire<kScope>(word)",
           "ld_relaxed<kScope>(word)"),
    Mutant("arrived: acquire of gpu scope", EXCHANGE, "wait_until<Scope::kSys>",
           "wait_until<Scope::kGpu>", "ACQUIRE(arrived)"),
    Mutant("acknowledged: release -> relaxed", PEERS, "st_release", "st_relaxed",
           "RELEASE(acknowledged)"),
    Mutant("acknowledged: acquire of gpu scope", EXCHANGE, "wait_until_reached<Scope::kSys>",
           "wait_until_reached<Scope::kGpu>", "ACQUIRE(acknowledged)"),
    Mutant("arrived: stale epoch", EXCHANGE, "epoch_of(word) == epoch;",
           "epoch_of(word) + 1 >= epoch;"),
    Mutant("arrived: what is there before the first use counts", EXCHANGE, "word != 0 && ", ""),
    Mutant("acknowledged: stale epoch", EXCHANGE, "peer, epoch_ - 1", "peer, epoch_ - 2"),
    Mutant("acknowledged: waits for no peer", EXCHANGE, "[this](i32 peer) {",
           "[this](i32 peer) { return;", "void wait_until_writable"),
    Mutant("acknowledged: one peer is not waited for", EXCHANGE, "[this](i32 peer) {",
           "[this](i32 peer) { if (peer + 1 == view_.num_ranks) return;", "void wait_until_writable"),
    Mutant("one peer never hears of a chunk", EXCHANGE, "[this, flag_idx](i32 peer) {",
           "[this, flag_idx](i32 peer) { if (peer + 1 == view_.num_ranks) return;",
           "void signal_arrived("),
    # --- ranks that take no part -----------------------------------------------------------------
    Mutant("an inactive rank is waited for", PEERS, "if (is_active(view, peer)) use(peer);", "use(peer);",
           "void share_out_peers", seeds=120),
    Mutant("a work item may be of an inactive rank", PEERS, "return is_active(view, peer) ? peer : -1;",
           "return peer;", seeds=120),
    Mutant("tokens of an inactive rank count", PLAN_CONTEXT,
           "has_token(tile, first) && tile.active;", "has_token(tile, first);", seeds=120),
    Mutant("routing of an inactive rank is waited for", PLAN_COUNT,
           "chunk <= last_chunk && tile.active;",
           "chunk <= last_chunk;", seeds=120),
    Mutant("experts of an inactive rank are selected", PLAN_CONTEXT,
           "return all_active(exchange.view()) ||",
           "return true ||", seeds=120),
    Mutant("epoch not advanced", EXCHANGE, "st(control(view_, channel_, ChannelControl::kEpoch), epoch_);", ""),
    Mutant("blocks_done not set back", EXCHANGE, "st(control(view_, channel_, ChannelControl::kBlocksDone), 0);", ""),
    Mutant("first block to finish acknowledges", EXCHANGE, "blocks_before + 1 != num_main() + static_cast<u32>(blocks_.num_tail)",
           "blocks_before != 0"),
    Mutant("acknowledged before the rows are read", DISPATCH, "if (!in_tail && warp_id() < context_.num_senders)",
           "if (thread_id() == 0 && block_id() == 0) "
           "for (i32 p = 0; p < context_.num_ranks; ++p) put_acknowledged("
           "context_.exchange.view(), Channel::kHighThroughput, p, ld(control(context_.exchange.view(), "
           "Channel::kHighThroughput, ChannelControl::kEpoch)) + 1); "
           "if (!in_tail && warp_id() < context_.num_senders)"),
    # --- barriers of the exchange ------------------------------------------------------------------
    _removed("warp_sync after waiting to write", EXCHANGE, "warp_sync();", '"acknowledged");'),
    _removed("warp_sync before arrived", EXCHANGE, "warp_sync();", "void signal_arrived("),
    _removed("warp_sync before arrived at owner", EXCHANGE, "warp_sync();", "void signal_arrived_at("),
    _removed("block_sync before blocks_done", EXCHANGE, "block_sync();", "void finish()"),
    _removed("warp_sync before acknowledged", EXCHANGE, "warp_sync();",
             "if (blocks_before + 1 != num_main() + static_cast<u32>(blocks_.num_tail)) return false;"),
    _removed("barrier before the grid barrier", EXCHANGE, "warps.sync();", "void grid_barrier("),
    _removed("barrier after the grid barrier", EXCHANGE, "warps.sync();", '"grid barrier");'),
    Mutant("grid barrier: release -> relaxed", EXCHANGE, "st_release<Scope::kGpu>(generation",
           "st_relaxed<Scope::kGpu>(generation"),
    Mutant("grid barrier: the last block does not wait for all", EXCHANGE,
           "fetch_add_acq_rel<Scope::kGpu>(count, 1) + 1 == num_main()",
           "fetch_add_acq_rel<Scope::kGpu>(count, 1) + 2 >= num_main()"),
    # --- what goes wrong -----------------------------------------------------------------------------
    Mutant("peers are not told", WAIT,
           "if (tag != WaitTag::kPeerGaveUp && view.given_up == nullptr) {", "if (false) {",
           mishaps=True),
    Mutant("one peer is not told", WAIT, "put_aborted(view, other, word);",
           "if (other + 1 < view.num_ranks) put_aborted(view, other, word);", mishaps=True),
    Mutant("nobody looks whether a peer gave up", WAIT, "if (word != 0) {", "if (false) {",
           mishaps=True),
    Mutant("another rank is blamed", WAIT, ".blamed = static_cast<u32>(peer)",
           ".blamed = static_cast<u32>(view.rank)", mishaps=True),
    Mutant("the record is not published", WAIT, "st_release<Scope::kSys>(record, 1);", "",
           mishaps=True),
    Mutant("a deadline never passes", WAIT, "return waited > static_cast<i64>(timeout) ?",
           "return false ?", mishaps=True),
    Mutant("a deadline passes at once", WAIT, "return waited > static_cast<i64>(timeout) ?",
           "return true ?"),
    Mutant("it does not poll once more after the deadline", WAIT,
           "level = look(view, context, start, level & ~kOverdue);",
           "if ((level = look(view, context, start, level)) & kOverdue) "
           "give_up(view, context, static_cast<u32>(seen));", mishaps=True),
    Mutant("a clock must not step back", WAIT, "static_cast<i64>(now_ns() - start)",
           "now_ns() - start"),
    Mutant("nobody who waits looks whether the group is closed", WAIT,
           "if (ld_relaxed<Scope::kSys>(control(view, Control::kClosed)) != 0)", "if (false)", mishaps=True),
    Mutant("the rank is not checked", EXCHANGE, "if (rank != view.rank)", "if (false)", mishaps=True),
    Mutant("one thread checks the rank", EXCHANGE, "if (rank != view.rank)",
           "if (block_id() == 0 && thread_id() == 0 && rank != view.rank)", mishaps=True),
    Mutant("long waits are not reported", WAIT, "level < kMaxLevel && waited",
           "false && waited", mishaps=True),
    Mutant("the end of a long wait is not reported", WAIT, "if (level != 0) report", "if (false) report",
           mishaps=True),
    Mutant("the report is of another exchange", WAIT, "LongWait{.epoch = context.expected",
           "LongWait{.epoch = context.expected - 1", mishaps=True),
    Mutant("another operation is not noticed", EXCHANGE, "if (seen != own_flag())", "if (false)",
           mishaps=True),
    Mutant("the call is not in the flag", EXCHANGE, "arrival_flag(epoch_, op_, call_tag_)",
           "arrival_flag(epoch_, op_, 0)", mishaps=True),
    Mutant("the operation is not in the flag", EXCHANGE, "arrival_flag(epoch_, op_, call_tag_)",
           "arrival_flag(epoch_, OpKind::kPlan, call_tag_)", mishaps=True),
    Mutant("two at once are not noticed", EXCHANGE, "if (running != 0)", "if (false)",
           "void check_alone()", seeds=60, mishaps=True),
    Mutant("a closed group's kernel runs (plan)", PLAN,
           "if (context_.exchange.closed()) return leave_no_results();", "", mishaps=True),
    Mutant("a closed group's kernel runs (dispatch)", DISPATCH,
           "if (context_.exchange.closed()) {", "if (false) {", mishaps=True),
    Mutant("a closed group's tail alone leaves no results", DISPATCH,
           "if (!in_tail) leave_no_results();",
           "if (in_tail) leave_no_results();", mishaps=True),
    Mutant("a closed group's kernel runs (plan_dispatch)", PLAN_DISPATCH,
           "if (exchange_.closed()) {", "if (false) {", mishaps=True),
    Mutant("a closed group's kernel leaves the plan as it is", PLAN_DISPATCH,
           "poison_plan(exchange_, op_.plan);", "", mishaps=True),
    Mutant("a closed group's kernel leaves the rows as they are", PLAN_DISPATCH,
           "poison_rows<typename RowLayout::RowType>(exchange_, op_.dispatch);", "", mishaps=True),
    Mutant("a closed group's kernel runs (combine)", COMBINE,
           "if (c_.exchange.closed()) return poison_combined(c_);", "", mishaps=True),
    Mutant("a closed group's kernel says nothing", EXCHANGE,
           "write_record(view_, {WaitTag::kClosed", "if (false) write_record(view_, {WaitTag::kClosed",
           mishaps=True),
    Mutant("a closed group's kernel leaves results as they are", EXCHANGE,
           "for (i64 i = i64{block_of_call()}", "for (i64 i = count + i64{block_of_call()}", mishaps=True),
    Mutant("rows of a handle from elsewhere may have holes", COMBINE_EXPERT,
           "count_bits(holders & lanes_below(lane_id()))", "lane_id()", mishaps=True),
    Mutant("selections of a handle from elsewhere may be equal", COMBINE_RANK,
           "other < local || earlier", "other < local", mishaps=True),
    Mutant("rows of a handle from elsewhere are not bounded", SELECTIONS,
           "return row < shape.recv_capacity ? row : -1;", "return row;", mishaps=True),
    Mutant("experts of a handle from elsewhere are not bounded", SELECTIONS,
           "expert < shape.num_experts &&", "", mishaps=True),
    # --- the segment ring --------------------------------------------------------------------------
    _removed("wait before a stage is loaded again", RING, "bulk_wait_read<1>();"),
    Mutant("waits for too few reads", RING, "bulk_wait_read<1>();", "bulk_wait_read<2>();"),
    _removed("warp_sync before a stage is loaded again", RING, "warp_sync();", "bulk_wait_read<1>();"),
    _removed("wait for a load", RING,
             "mbar_wait(&stages_.loaded[stage], uses_ / Stages::kStages % 2);"),
    Mutant("parity of a load not flipped", RING, "uses_ / Stages::kStages % 2", "0"),
    Mutant("loads run one stage too far ahead", RING, "kAhead = Stages::kStages - 2",
           "kAhead = Stages::kStages - 1"),
    Mutant("expects too few bytes", RING, "stage], source.bytes);", "stage], source.bytes - 16);"),
    _removed("fence after mbarriers are made", RING, "mbar_init_fence();"),
    # --- the FP8 wire ------------------------------------------------------------------------------
    _removed("warp_sync before quantized values overwrite", QUANTIZE, "warp_sync();",
             "load(first + kBlocks * kVectorsPerBlock);"),
    Mutant("scales not filled up to 16 bytes", QUANTIZE, "align_up(ceil_div(num_elements, kScaleBlock), 4)",
           "ceil_div(num_elements, kScaleBlock)"),
    _removed("proxy fence after quantizing", QUANTIZE,
             "fence_proxy_async_shared();  // the copy engines see what the lanes wrote"),
    _removed("warp_sync after quantizing", QUANTIZE, "warp_sync();",
             "the copy engines see what the lanes wrote"),
    _removed("warp_sync before restored values overwrite", QUANTIZE, "warp_sync();",
             "v / kLanesPerBlock % kWarpSize));"),
    _removed("proxy fence after restoring", QUANTIZE, "fence_proxy_async_shared();", "st(as<Vec16>(stage) + v"),
    _removed("warp_sync after restoring", QUANTIZE, "warp_sync();", "st(as<Vec16>(stage) + v"),
    # --- dispatch ----------------------------------------------------------------------------------
    _removed("wait for bulk stores before arrived", SENDER, "bulk_wait<0>();",
             "before the chunk is said to be."),
    Mutant("bulk stores only read before arrived", SENDER, "bulk_wait<0>();",
           "bulk_wait_read<0>();", "before the chunk is said to be."),
    _removed("wait for bulk stores at the end", DISPATCH, "bulk_wait<0>();", "receiver.receive();\n"),
    _removed("wait to write (dispatch)", SENDER, "c_.exchange.wait_until_writable();"),
    _removed("wait for arrival (dispatch)", RECEIVER,
             "if (lane_id() == 0) c_.exchange.wait_arrived(source, flag_idx);"),
    _removed("warp_sync after arrival (dispatch)", RECEIVER, "warp_sync();",
             "exchange.wait_arrived(source, flag_idx);"),
    _removed("proxy fence after arrival", RECEIVER, "fence_proxy_async_global();"),
    Mutant("proxy fence after arrival of the other memory", RECEIVER, "fence_proxy_async_global();",
           "fence_proxy_async_shared();"),
    Mutant("announced before it is written", SENDER, "bulk_wait<kAnnouncedAfter>();",
           "bulk_wait<kAnnouncedAfter + 1>();"),
    _removed("wait before a chunk is announced late", SENDER, "bulk_wait<kAnnouncedAfter>();"),
    Mutant("a sent chunk is never announced", SENDER, "    announce_all();\n  }", "  }"),
    Mutant("early flag (dispatch)", SENDER, "const i32 flag_idx = work.item();",
           "const i32 flag_idx = work.item(); c_.exchange.signal_arrived(flag_idx);", "void send()"),
    Mutant("wrong destination of rows", PEERS, "return staged_row(view, peer, view.rank, token);",
           "return staged_row(view, peer, peer, token);"),
    Mutant("wrong chunk awaited", RECEIVER, "exchange.wait_arrived(source, flag_idx)",
           "exchange.wait_arrived(source, flag_idx > 0 ? flag_idx - 1 : 0)"),
    Mutant("wrong slot", SELECTIONS, "(1U << lane) - 1",
           "(2U << lane) - 1"),
    Mutant("scalars lie in the order of a token's selections", DISPATCH_EXPERT,
           "= selections.position(c_.num_topk);", "= lane_id();"),
    _removed("check that a lane has a row for its scalar", DISPATCH_EXPERT, "if (row >= 0)"),
    Mutant("a rank gets the scalars of other ranks' selections", DISPATCH_RANK,
           "selections.dest() == dest ? scalar : 0.0F", "scalar"),
    Mutant("scalars of a token that has no row are written", DISPATCH_RANK, "only < 0 ||", ""),
    Mutant("of a row without token one scalar is cleared", DISPATCH_RANK, "return c_.num_topk;",
           "return 1;"),
    # --- products of dispatch ----------------------------------------------------------------------
    _removed("start of a dot product anew", PRODUCTS, "if (segment == 0) dot_ = 0.0F;"),
    Mutant("a dot product is summed by several warps", CONTEXT, "bulk && !with_dots(),", "bulk,",
           seeds=120, every_dtype=True),
    Mutant("a dot product is written before its last segment", PRODUCTS,
           "segment + 1 == c_.segments.count", "segment == 0", seeds=120, every_dtype=True),
    Mutant("a dot product of another lane's row goes on", PRODUCTS,
           "if (lane_id() == lane) dot_ = dot;", "dot_ = dot;", seeds=120),
    Mutant("neighboring sums are added in another order", PRODUCTS,
           "u32 distance = 1; distance < kWarpSize; distance *= 2",
           "u32 distance = kWarpSize / 2; distance > 0; distance /= 2"),
    Mutant("segments of any size for dot products", CONTEXT,
           "if (Config::kProducts) return static_cast<i32>(kDotBlock);", "", seeds=120, every_dtype=True),
    Mutant("rows that are multiplied go out as they came, too", RECEIVER,
           "row < 0 || c_.weighted()", "row < 0"),
    Mutant("elements that are multiplied go out as they came, too", RECEIVER,
           "} else if (!c_.weighted()) {", "} else {", seeds=120),
    _removed("dot products of rows without token", RECEIVER,
             "if (c_.with_dots() && lane_id() == 0) st(Ptr<float>{c_.op.row_dots} + row, 0.0F);"),
    Mutant("dot products of rows that do not travel", RECEIVER,
           "c_.hidden == 0 && !c_.with_dots()", "c_.hidden == 0", seeds=120),
    _removed("a closed group's dot products", CLOSED,
             "if (op.with_dots) set_floats(exchange, op.row_dots, capacity, word);",
             mishaps=True),
    # --- combine -----------------------------------------------------------------------------------
    _removed("wait to write (combine)", COMBINE_SENDER, "c_.exchange.wait_until_writable();"),
    _removed("warp_sync after arrival (combine)", COMBINE_RECEIVER, "warp_sync();",
             "c_.exchange.wait_arrived(source, flag_idx);"),
    _removed("wait for a term", SUM, "async_wait<kStages - 1>();", "void exchange("),
    Mutant("waits for all terms but one more", SUM, "async_wait<kStages - 1>();",
           "async_wait<kStages>();", "void exchange("),
    Mutant("waits for all terms but one more, outside of the loop", SUM,
           "async_wait<kStages - 1>();", "async_wait<kStages>();"),
    _removed("wait for a term in a ring that is not full", SUM, "async_wait<0>();"),
    Mutant("one load too many", SUM, "loads_ - uses_ == kStages", "loads_ - uses_ == kStages + 1"),
    Mutant("loads that are nothing are forgotten", SUM, "    ++loads_;\n    async_commit();",
           "    ++loads_;"),
    _removed("start of the ring anew", SUM, "ring_.restart();", every_dtype=True),
    Mutant("a row with several weights is added once", SUM,
           "ring_.is_full() && terms.weights_per_row() == 1", "ring_.is_full()", seeds=120),
    Mutant("a load is started after the last", SUM, "if (loads) load_vectors(", "load_vectors("),
    Mutant("a place is loaded again before it is read", SUM,
           "for (int v = 0; v < kVectors; ++v) row[v] = ld(at + v * kLanes);",
           "if (loads) load_vectors(at, from + lane_id(), std::make_integer_sequence<int, kVectors>());"
           " for (int v = 0; v < kVectors; ++v) row[v] = ld(at + v * kLanes);"),
    Mutant("lanes load more than the segment has", SUM,
           "v * kLanes < spare ? v * kLanes : spare", "v * kLanes"),
    Mutant("the last segment is loaded as if it were full", SUM,
           "last_segment_ - static_cast<i32>(has_last)", "last_segment_"),
    Mutant("a rank's own sum is not rounded by itself", PIECE_SUM, "= sum.take();", "= sum.rounded();"),
    Mutant("a rank's own sum is left out (pieces)", PIECE_SUM, "if (term == terms.own_sum_at())",
           "if (false)"),
    Mutant("domains are summed as one", PIECE_SUM, "if (of != domain)", "if (false)"),
    Mutant("a domain's sum has those before in it", PIECE_SUM, "of_domain.take());",
           "of_domain.rounded());"),
    _removed("sum of the last domain", PIECE_SUM, "sum.add(1.0F, of_domain.take());",
             "load(term));\n      }\n"),
    Mutant("a rank's own sum is of the first domain", PIECE_SUM, "add(own_domain, own)", "add(0, own)"),
    Mutant("ranks of a domain do not follow each other", COMBINE_CONTEXT,
           "of_rank / ranks_per_domain", "of_rank % ranks_per_domain"),
    Mutant("a part of a row is summed from its first piece on", COMBINE_SUMS,
           "pieces_before<Piece>(c, part.first_segment)", "i64{0}"),
    Mutant("a part of a row is summed to its last piece", COMBINE_SUMS,
           "pieces_before<Piece>(c, part.last_segment)", "pieces_before<Piece>(c, c.segments.count)"),
    Mutant("a rank's own sum comes first", SUM, "if (kHasOthers && term == terms.own_sum_at()) {",
           "if (kHasOthers && term == terms.own()) {", seeds=120, every_dtype=True),
    Mutant("waits for all ranks but one (combine)", COMBINE_RECEIVER, "c_.exchange.wait_arrived(source, flag_idx);",
           "if (source + 1 < c_.num_ranks) c_.exchange.wait_arrived(source, flag_idx);"),
    Mutant("early flag (combine)", COMBINE_SENDER, "if (owner < 0) continue;",
           "if (owner < 0) continue; c_.exchange.signal_arrived_at(owner, flag_idx);", "void send()"),
    Mutant("ranks summed in another order", COMBINE_RECEIVER, "other < selections.dest()",
           "other > selections.dest()"),
    Mutant("a row of several selections counts once", COMBINE_RANK,
           "terms.set(terms.own(), count > 0 ? count : 1);", "terms.set(terms.own(), 1);"),
    Mutant("a selection's scalar is that of another", COMBINE_EXPERT,
           "return selections.position(c_.num_topk);", "return lane_id();"),
    Mutant("scalars of this rank are those of another selection", COMBINE_RANK,
           "i64{selections.slot()} * c_.num_topk + lane_id();", "i64{selections.slot()} * c_.num_topk;"),
    # --- chunks and parts ----------------------------------------------------------------------------
    Mutant("the last token of a chunk is left out", PARTS, "return last < num_tokens ? last : num_tokens;",
           "return last < num_tokens ? last : num_tokens - 1;"),
    Mutant("the last segment of a part is left out", PARTS, ".last_segment = first_segment(part + 1),",
           ".last_segment = first_segment(part + 1) - static_cast<i32>(per_chunk > 1),", seeds=120),
    Mutant("scalars go with no part", PARTS, ".has_scalars = part == 0", ".has_scalars = part == 1"),
    # --- tickets -------------------------------------------------------------------------------------
    Mutant("a ticket is left out", QUEUE, "(tickets_, 1);", "(tickets_, 2);"),
    Mutant("two warps have one item", QUEUE, "item_ = num_positions_ + ", "item_ = num_positions_ - 1 + "),
    Mutant("tickets not set back", EXCHANGE,
           "st(control(view_, channel_, ChannelControl::kSendTickets), 0);", ""),
    Mutant("receivers' tickets not set back", EXCHANGE,
           "st(control(view_, channel_, ChannelControl::kReceiveTickets), 0);", ""),
    # --- the tail ----------------------------------------------------------------------------------
    Mutant("acknowledged before the tail has read", EXCHANGE,
           "num_main() + static_cast<u32>(blocks_.num_tail)", "num_main()", in_plan_dispatch=True),
    Mutant("the tail sends", DISPATCH, "if (!in_tail && warp_id()", "if (warp_id()"),
    Mutant("the tail has places", EXCHANGE, "in_tail() || warp_id()", "warp_id()"),
    Mutant("the tail does not wait for what has been sent", RECEIVER, "if (lane_id() == 0) c_.exchange",
           "if (lane_id() == 0 && !c_.exchange.in_tail()) c_.exchange"),
    Mutant("rows without a token are left to a tail that does not clear them", RECEIVER,
           "(has_tail ? num_clear_runs() : 0)", "0"),
    Mutant("nobody receives the last token of a chunk", RECEIVER, "token >= part.last_token",
           "token + 1 >= part.last_token"),
    Mutant("warps that have sent are not set back", EXCHANGE,
           "st(control(view_, channel_, ChannelControl::kSendersDone), 0);", ""),
    Mutant("one peer is never told that all is sent", EXCHANGE, "[this](i32 peer) { put_sent",
           "[this](i32 peer) { if (peer + 1 != view_.num_ranks) put_sent", in_plan_dispatch=True),
    Mutant("a rank tells nobody that all is sent", EXCHANGE, "num_main() * num_senders) return;",
           "num_main() * num_senders + 1) return;", in_plan_dispatch=True),
    # --- plan --------------------------------------------------------------------------------------
    _removed("wait to write (plan)", PLAN_COUNT, "c_.exchange.wait_until_writable();"),
    Mutant("a tile does not wait for its last chunk", PLAN_COUNT, "chunk <= last_chunk", "chunk < last_chunk"),
    _removed("warp_sync after arrival (plan)", PLAN_COUNT, "warp_sync();",
             "exchange.wait_arrived(tile.source, chunk);\n    }"),
    _removed("warp_sync after advancing", PLAN_CONTEXT, "warp_sync();", "count_bits(counted.lanes);\n    }"),
    _removed("warp_sync after loading cursors", PLAN_ASSIGN, "warp_sync();", "load_cursors(item, own);"),
    _removed("warp_sync before advancing (assign)", PLAN_ASSIGN, "warp_sync();  // all rows are read before a cursor moves"),
    Mutant("a token's own selections counted before it", PLAN_CONTEXT,
           "counted.lanes & lanes_below(first_lane)", "counted.lanes & lanes_below(lane_id() + 1)"),
    Mutant("repeated experts take part", PLAN_CONTEXT, "expert < 0 || repeats ?", "expert < 0 ?"),
    Mutant("experts that do not exist take part", PLAN_CONTEXT, "is_expert(expert) ? expert : -1",
           "expert >= -1 ? expert : -1"),
    _removed("grid barrier before the scan", PLAN_STEPS,
             "context.exchange.grid_barrier(context.warps);", "counter.count();"),
    _removed("grid barrier after the scan", PLAN_STEPS,
             "context.exchange.grid_barrier(context.warps);", "counter.scan();"),
    _removed("barrier after the starts", PLAN_ASSIGN, "c_.warps.sync();", "find_starts();"),
    Mutant("the end of an expert's rows is not aligned", PLAN_EXPERT,
           "aligned(ld(c_.totals() + expert))", "ld(c_.totals() + expert)"),
    Mutant("a token counts at a rank as often as it selects experts there", PLAN_RANK,
           "lanes_alike(static_cast<u32>(bin + 1), c_.bin_bits)", "selection.same_expert"),
    # --- a plan in its dispatch ------------------------------------------------------------------
    _removed("wait for the plan", PLAN_DISPATCH, "exchange_.wait_planned();"),
    Mutant("who has sent does not wait for the plan", PLAN_DISPATCH, "exchange_.wait_planned();",
           "if (warp_id() >= dispatch_.num_senders) exchange_.wait_planned();"),
    Mutant("who has made its part does not wait for the plan", PLAN_DISPATCH,
           "exchange_.wait_planned();",
           "if (warp_id() < dispatch_.num_senders) exchange_.wait_planned();"),
    _removed("warp_sync after waiting for the plan", EXCHANGE, "warp_sync();", '"planned");\n    }',
             in_plan_dispatch=True),
    _removed("barrier before the plan is announced", EXCHANGE, "warps.sync();",
             "void announce_plan(", in_plan_dispatch=True),
    Mutant("planned: release -> relaxed", EXCHANGE, "st_release<Scope::kGpu>(", "st_relaxed<Scope::kGpu>(",
           "RELEASE(planned)", in_plan_dispatch=True),
    Mutant("planned: blocks come relaxed", EXCHANGE, "fetch_add_acq_rel<Scope::kGpu>(count, 1)",
           "fetch_add_relaxed<Scope::kGpu>(count, 1)", "RELEASE(planned)", in_plan_dispatch=True),
    Mutant("the first block announces the plan", EXCHANGE, "+ 1 != num_main()) return;",
           "!= 0) return;", "RELEASE(planned)", in_plan_dispatch=True),
    Mutant("blocks that made the plan are not forgotten", EXCHANGE, "st_relaxed<Scope::kGpu>(count, 0);",
           "", "RELEASE(planned)", in_plan_dispatch=True),
    Mutant("the plan is not forgotten", EXCHANGE, "if (op_ == OpKind::kPlanDispatch)", "if (false)"),
    Mutant("a plan's barrier is for all warps", DEVICE + "block_warps.h",
           "named_sync(kBarrier, count() * kWarpSize);", "block_sync();"),
    Mutant("the tail does not wait for the plan", PLAN_DISPATCH, "exchange_.wait_planned();",
           "if (!in_tail) exchange_.wait_planned();"),
    Mutant("the tail makes a plan too", PLAN_DISPATCH, "} else if (!in_tail) {", "} else {",
           "void take_part("),
    Mutant("the tail sends (plan_dispatch)", PLAN_DISPATCH, "if (!in_tail && warp_id()",
           "if (warp_id()"),
    Mutant("rows have the flags of the routing", PLAN_DISPATCH, "with_flags_from(kRowFlags)",
           "with_flags_from(0)"),
    _removed("proxy fence after the tables", PLAN_DISPATCH, "fence_proxy_async_shared();"),
    Mutant("proxy fence after the tables of the other memory", PLAN_DISPATCH,
           "fence_proxy_async_shared();", "fence_proxy_async_global();"),
    Mutant("tables lie in a sender's stages", PLAN_DISPATCH_BLOCK, "words_of(warp_id())",
           "words_of(warp_id() - warps.first())"),
    Mutant("starts lie on cursors", PLAN_DISPATCH_BLOCK, "words_of(warps.first()) + kMaxBins",
           "words_of(warps.first())"),
    Mutant("starts lie in a sender's stages", PLAN_DISPATCH_BLOCK,
           "words_of(warps.first()) + kMaxBins", "words_of(0) + kMaxBins"),
    _removed("wait for bulk stores at the end (plan_dispatch)", PLAN_DISPATCH, "bulk_wait<0>();"),
    Mutant("a plan's warp is left out", DEVICE + "block_warps.h", "return warp_id() - first_;",
           "return warp_id() - first_ + 1;"),
    Mutant("rows go to the owners of repeated experts' lanes", SELECTIONS,
           "if (lowest_bit(warp_match(static_cast<u32>(expert_))) != lane) dest_ = -1;", "",
           in_plan_dispatch=True),
    Mutant("rows go to a rank that takes no part", SELECTIONS, "if (is_active(view, owner)) dest_",
           "dest_", seeds=120, in_plan_dispatch=True),
    Mutant("rows go to the owners of experts that do not exist", SELECTIONS,
           "if (expert_ >= 0 && expert_ < shape.num_experts) {", "if (expert_ >= 0) {",
           in_plan_dispatch=True),
    Mutant("scalars of an unplanned token lie in the order of its selections", SELECTIONS,
           "num_earlier(expert_,", "num_earlier(static_cast<i32>(lane_id()),",
           in_plan_dispatch=True),
    # --- what must not be noticed --------------------------------------------------------------------
    Mutant("unchanged", EXCHANGE, "class Exchange", "class Exchange", harmless=True, seeds=25),
    Mutant("release as a fence and a relaxed store", PEERS, "st_release<Scope::kSys>(",
           "fence_acq_rel<Scope::kSys>(), st_relaxed<Scope::kSys>(", "RELEASE(arrived): pub",
           harmless=True, seeds=25),
    Mutant("more barriers", SENDER, "c_.exchange.signal_arrived(unannounced_);",
           "warp_sync(); c_.exchange.signal_arrived(unannounced_);", harmless=True, seeds=25),
    Mutant("work items in reverse order (combine)", COMBINE_SENDER,
           "const i32 flag_idx = work.item() / num_others;",
           "const i32 flag_idx = c_.parts.count() - 1 - work.item() / num_others;",
           harmless=True, seeds=25),
]  # fmt: skip
