# SPDX-License-Identifier: Apache-2.0
"""What dispatch and combine do with a routing, as steps of the model: chunks, segments, senders.

Kernels in which each chunk is whole, that is, with 1024 tokens or more.
"""

import dataclasses
import math

import numpy as np

from ep_bench.bytes_moved import FP8_ROW, ROW
from ep_bench.cases import NUM_TOPK, GpuCase
from ep_bench.exchange_model import Launch, Receive, Step, Steps, Work

# Of csrc/core/work_partition.h and csrc/tuning; the test compares them.
CHUNK_TARGET, MAX_CHUNKS = 256, 2048
MAX_CHUNK_TOKENS = {"dispatch": 4, "combine": 2}
SEGMENT_BYTES = {"dispatch": 4096, "combine": 2048}
DISPATCH_WARPS, COMBINE_WARPS = 14, 16
COMBINE_STAGES = 8
ELEMENTS_OF_A_STEP = 256
SM_STORE_RATE, LINK_RATE = 54_000, 341_000  # bytes in a microsecond
MIN_TAIL_BYTES = 20e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instructions:
    """Of a warp.

    Attributes:
        quantize: for 256 elements.
        restore: likewise, from FP8.
        add: for a row of 2 KiB that is added to a sum, all that goes with it included.
        add_again: for each further weight of that row, in layout "rank".
    """

    quantize: float
    restore: float
    add: float
    add_again: float


def chunk_tokens(operation: str, num_tokens: int) -> int:
    """Tokens of a chunk."""
    few = min(max(math.ceil(num_tokens / CHUNK_TARGET), 1), MAX_CHUNK_TOKENS[operation])
    return max(few, math.ceil(num_tokens / MAX_CHUNKS))


def has_tail(case: GpuCase) -> bool:
    """Whether tuning lets a dispatch of at least `CHUNK_TARGET` tokens end on idle SMs."""
    ranks, tokens = case.num_ranks, case.num_tokens
    of_token = ranks * (1 - (1 - 1 / ranks) ** NUM_TOPK)
    rows = of_token if case.layout == "rank" else NUM_TOPK
    sent = tokens * of_token * (1 - 1 / ranks) * (FP8_ROW if case.wire_dtype else ROW)
    left = tokens * rows * ROW + sent - sent / LINK_RATE * SM_STORE_RATE * case.num_sms
    return case.tail and left >= MIN_TAIL_BYTES


def num_senders(operation: str, case: GpuCase) -> int:
    """Of a block's warps."""
    if operation == "combine":
        items = math.ceil(case.num_tokens / chunk_tokens(operation, case.num_tokens))
        if items * case.num_ranks <= 2 * COMBINE_WARPS * case.num_sms:
            return COMBINE_WARPS // 2
        return 8 if case.layout == "rank" else 10
    if has_tail(case) and case.num_ranks <= 2:
        return 8 if case.wire_dtype is None else 12
    if case.wire_dtype is None:
        return 5
    return 8 if case.layout == "rank" else 6


def launch(operation: str, case: GpuCase) -> Launch:
    """How tuning launches it, on `num_sms`."""
    senders = num_senders(operation, case)
    if operation == "combine":
        # Its stages hold the rows of one or two sums.
        return Launch(num_warps=COMBINE_WARPS, num_senders=senders, ahead=1, waits_for_stores=True)
    return Launch(num_warps=DISPATCH_WARPS, num_senders=senders, ahead=2, waits_for_stores=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Counts:
    """`[R, R, T]`, by source, destination and token."""

    goes: np.ndarray  # 1 where the token goes there
    held: np.ndarray  # rows there that hold it


def _counts(case: GpuCase) -> _Counts:
    destination = case.topk_idx // (case.num_experts // case.num_ranks)
    selected = (destination[..., None] == np.arange(case.num_ranks)).sum(axis=2)
    goes = np.moveaxis(selected > 0, 2, 1).astype(int)
    held = goes if case.layout == "rank" else np.moveaxis(selected, 2, 1)
    return _Counts(goes=goes, held=held)


def _chunks(operation: str, case: GpuCase) -> list[range]:
    size = chunk_tokens(operation, case.num_tokens)
    firsts = range(0, case.num_tokens, size)
    return [range(first, min(first + size, case.num_tokens)) for first in firsts]


def _segments(operation: str) -> int:
    return math.ceil(ROW / SEGMENT_BYTES[operation])


def dispatch_work(case: GpuCase, cost: Instructions, *, whole_chunks: bool = False) -> Work:
    """What rank 0 does; all ranks are alike.

    Args:
        case: what is moved.
        cost: of what is converted.
        whole_chunks: whether a receiver takes a chunk at once, as it once did, and no token.
    """
    counts, segments = _counts(case), _segments("dispatch")
    fp8 = case.wire_dtype is not None
    row, wire = ROW / segments, (FP8_ROW if fp8 else ROW) / segments
    elements = ROW / 2 / segments / ELEMENTS_OF_A_STEP
    others = counts.goes[0, 1:].sum(axis=0)
    home = counts.goes[0, 0] if fp8 else np.zeros(case.num_tokens, int)

    def send(token: int) -> Steps:
        if others[token] + home[token] == 0:
            return []
        quantize = elements * cost.quantize if fp8 else 0.0
        step = Step(
            into=row,
            instructions=quantize,
            out=float(home[token] * wire),
            link=float(others[token] * wire),
        )
        return [step] * segments

    def receive(source: int, token: int) -> Steps:
        held = counts.held[source, 0, token]
        restore = elements * cost.restore if fp8 else 0.0
        step = Step(into=wire, instructions=restore, out=float(held * row), link=0.0)
        return [step] * segments if held else []

    chunks = _chunks("dispatch", case)
    return Work(
        sends=[[step for token in chunk for step in send(token)] for chunk in chunks],
        receives=[
            Receive(
                needs=[i] if source or fp8 else [],
                steps=[step for token in tokens for step in receive(source, token)],
            )
            for i, chunk in enumerate(chunks)
            for source in range(case.num_ranks)
            for tokens in ([chunk] if whole_chunks else [[token] for token in chunk])
        ],
    )


def combine_work(case: GpuCase, cost: Instructions) -> Work:
    """What rank 0 does; all ranks are alike."""
    counts, segments = _counts(case), _segments("combine")
    row, add = ROW / segments, cost.add * ROW / segments / 2048
    again = cost.add_again * ROW / segments / 2048
    selected = dataclasses.replace(case, layout="expert")
    weights = _counts(selected).held if case.layout == "rank" else counts.held

    def steps(own: int, weights_of: int, staged: int, out: float, link: float) -> Steps:
        if own + staged == 0:
            return []
        instructions = (own + staged) * add + max(weights_of - own, 0) * again
        step = Step(into=(own + staged) * row, instructions=float(instructions), out=out, link=link)
        return [step] * segments

    def send(owner: int, token: int) -> Steps:
        own = counts.held[owner, 0, token]
        return steps(own, weights[owner, 0, token], 0, 0.0, row)

    def receive(token: int) -> Steps:
        staged = counts.goes[0, 1:, token].sum()
        return steps(counts.held[0, 0, token], weights[0, 0, token], staged, row, 0.0)

    chunks = _chunks("combine", case)
    turns = case.num_ranks - 1
    return Work(
        sends=[
            [step for token in chunk for step in send(owner, token)]
            for chunk in chunks
            for owner in range(1, case.num_ranks)
        ],
        receives=[
            Receive(
                needs=range(i * turns, (i + 1) * turns),
                steps=[step for token in chunk for step in receive(token)],
            )
            for i, chunk in enumerate(chunks)
        ],
    )
