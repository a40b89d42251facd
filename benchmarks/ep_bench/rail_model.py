# SPDX-License-Identifier: Apache-2.0
"""An event model of dispatch and combine between domains: one rail, and what its ranks do.

Rail senders, NICs, relays, pulls, credits, and what combine has in their place. Rails do not meet
on the network and the ranks of a domain are alike, so one rail stands for all. What is modeled, and
what is not: docs/measurements/internode_model.md, which benchmarks/internode_model.py writes.
"""

import abc
import bisect
import dataclasses
import heapq
import math
import random
from array import array
from collections.abc import Sequence

# csrc/core/network_layout.h: how large rail chunks and rings are.
RINGS = {
    "kManyDomains": 17,
    "kBuffersOfAll": 64,
    "kFewestBuffers": 3,
    "kMostBuffers": 16,
    "kGatherTokens": 1024,
    "kMaxRailChunkTokens": 64,
    "kRailChunkParts": 4,
    "kMessageHeaderBytes": 16,
}
FEW_DOMAINS_CHUNK_TOKENS = 32
# csrc/tuning: warps of a block, those of each role, and blocks, one on an SM.
WARPS = {"dispatch": 12, "combine": 8}
WARPS_OF_ROLE = {"dispatch": 3, "combine": 2}
NUM_SMS = 24


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What the hardware does; GB/s are of one rank and one direction.

    *Measured*, *fitted* and *counted*: on two H200, within a domain
    (benchmarks/calibration/two_h200.json, docs/measurements/performance.md). Nothing of a network.

    Attributes:
        nic_gb_s: rows on the wire. Assumed: a NIC of 400 Gb/s, so 50 GB/s, less 6 % for headers.
        hop_us: from a NIC that begins to send to one that begins to receive. Assumed.
        message_us: of the sending NIC for a message, beside its bytes. Assumed: kernels post.
        link_gb_s: over NVLink into a rank. Measured: loads from the peer, 24 SMs, both ways.
        flag_us: until a word is seen by another rank of the domain. Measured.
        release_us: from a store's end to when a word after it has been stored. As in that model.
        poll_us: to see a word and to go on. Likewise.
        load_us: from a bulk load to its data. Fitted.
        instructions_per_us: of one warp, which mostly waits for itself. Fitted.
        quantize_instructions: of a warp for 256 elements. Fitted.
        restore_instructions: likewise, from FP8. Counted in machine code.
        add_instructions: to add 2 KiB of a row. Fitted.
        scan_us: of a warp, to find which tokens of a rail chunk a message has. Assumed.
        post_us: of a warp that puts a message or signals a word. Assumed.
    """

    nic_gb_s: float = 47.0
    hop_us: float = 3.0
    message_us: float = 0.05
    link_gb_s: float = 334.0
    flag_us: float = 0.782
    release_us: float = 1.7
    poll_us: float = 1.0
    load_us: float = 1.26
    instructions_per_us: float = 0.27 * 1755
    quantize_instructions: float = 143.0
    restore_instructions: float = 58.0
    add_instructions: float = 111.0
    scan_us: float = 2.0
    post_us: float = 1.0

    def add_us(self, hidden: int) -> float:
        """Of a warp that adds a row to a sum."""
        return 2 * hidden / 2048 * self.add_instructions / self.instructions_per_us

    def move_us(self, hidden: int, fp8_instructions: float | None) -> float:
        """Of a warp that moves a row, by three bulk loads of 3.5 KiB at once or by instructions."""
        if fp8_instructions is None:
            return 2 * hidden / (3 * 3584) * self.load_us
        return hidden / 256 * fp8_instructions / self.instructions_per_us


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Who sends what to whom.

    Attributes:
        num_domains: `N`.
        num_groups: domains that the experts of a token may lie in; all if there are no more. All
            sets of so many domains are alike, and all sets of `K` experts in them.
        domain_ranks: `G`.
        num_tokens: `T`, of a rank.
        num_topk: `K`.
        hidden: `H`, elements.
    """

    num_domains: int
    num_groups: int = 4
    domain_ranks: int = 8
    num_tokens: int = 4096
    num_topk: int = 8
    hidden: int = 7168

    @property
    def num_ranks(self) -> int:
        """`R`."""
        return self.num_domains * self.domain_ranks

    @property
    def num_experts(self) -> int:
        """`E`: 256, and at least one for each rank."""
        return max(256, self.num_ranks)

    def _share(self, experts: int) -> float:
        """Of all tokens, those that select one of so many experts of a domain."""
        groups = min(self.num_groups, self.num_domains)
        among = self.num_experts // self.num_domains * groups
        missed = math.comb(among - experts, self.num_topk) / math.comb(among, self.num_topk)
        return groups / self.num_domains * (1 - missed)

    @property
    def away(self) -> float:
        """Of the rows that ranks of a domain have for one of them, those that are not its own."""
        return 1 - 1 / self.domain_ranks

    @property
    def of_domain(self) -> float:
        """Of all tokens, those that a domain wants."""
        return self._share(self.num_experts // self.num_domains)

    @property
    def of_rank(self) -> float:
        """Of all tokens, those that a rank wants."""
        return self._share(self.num_experts // self.num_ranks)

    @property
    def remote_domains(self) -> float:
        """That a token goes to: rows on the wire."""
        return (self.num_domains - 1) * self.of_domain

    @property
    def holders(self) -> float:
        """Ranks of a domain that want a token which the domain wants."""
        return self.domain_ranks * self.of_rank / self.of_domain

    @property
    def experts_of_holder(self) -> float:
        """That a token selects on a rank that wants it."""
        return self.num_topk / (self.num_ranks * self.of_rank)

    def row_bytes(self, *, fp8: bool) -> int:
        """Of a row on the wire, with its scales."""
        return self.hidden + 4 * math.ceil(self.hidden / 128) if fp8 else 2 * self.hidden

    def network_bytes(self, *, fp8: bool) -> float:
        """Expected rows of a rank on the wire, each way."""
        return self.num_tokens * self.remote_domains * self.row_bytes(fp8=fp8)

    def link_bytes(self, *, fp8: bool) -> float:
        """Expected rows into a rank over NVLink, from ranks of its domain."""
        from_domain = self.num_tokens * self.num_ranks * self.of_rank
        return from_domain * self.away * self.row_bytes(fp8=fp8)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """What the kernels do with it.

    Attributes:
        operation: "dispatch" or "combine".
        fp8: whether rows travel in FP8; dispatch alone.
        chunk_tokens: `Q`.
        window: `W`, buffers for each other domain.
        units: `U`, of the ring of sums.
        num_sms: each with one block.
        rail_senders: warps of a block that pack messages; as many send to the own domain, and in
            combine as many push and as many reduce.
        receivers: warps of a block that do nothing but receive; in dispatch also the relays.
        relays: warps that relay; as many give credits. Each takes every so many-th message.
        relays_as_sent: whether they take a chunk's messages in the order in which the other
            domains send them; else in this domain's order of sending, which is the reverse.
        domain_first: whether what the own domain sends is received before anything is pulled.
        skew_us: domains start within so long.
        slow_nic: what one NIC of the rail has of its rate.
    """

    operation: str
    fp8: bool = False
    chunk_tokens: int
    window: int
    units: int
    num_sms: int = NUM_SMS
    rail_senders: int
    receivers: int
    relays: int = 1
    relays_as_sent: bool = False
    domain_first: bool = True
    skew_us: float = 0.0
    slow_nic: float = 1.0


def product_design(num_domains: int, operation: str) -> Design:
    """What the library does; dispatch in FP8."""
    few = num_domains < RINGS["kManyDomains"]
    tokens = FEW_DOMAINS_CHUNK_TOKENS if few else RINGS["kMaxRailChunkTokens"]
    buffers = math.ceil(RINGS["kBuffersOfAll"] / (num_domains - 1))
    role = WARPS_OF_ROLE[operation]
    roles = 2 if operation == "dispatch" else 3
    return Design(
        operation=operation,
        fp8=operation == "dispatch",
        chunk_tokens=tokens,
        window=min(max(buffers, RINGS["kFewestBuffers"]), RINGS["kMostBuffers"]),
        units=RINGS["kGatherTokens"] // tokens,
        rail_senders=role,
        receivers=WARPS[operation] - roles * role,
    )


def larger_design(num_domains: int, operation: str) -> Design:
    """The same with larger rings, more SMs and more relays: what the model says helps."""
    built = product_design(num_domains, operation)
    return dataclasses.replace(
        built,
        window=max(6, math.ceil(128 / (num_domains - 1))),
        units=4 * built.units,
        num_sms=2 * built.num_sms,
        relays=8,
        domain_first=False,
    )


def sampled_rows(problem: Problem, chunk_tokens: int, count: int, seed: int) -> bytearray:
    """Rows of so many messages: binomial, each for itself. The same on all versions of Python."""
    share = problem.of_domain
    below, total = [], 0.0
    for rows in range(chunk_tokens):
        total += math.comb(chunk_tokens, rows) * share**rows * (1 - share) ** (chunk_tokens - rows)
        below.append(total)
    draw = random.Random(seed).random
    return bytearray(bisect.bisect_right(below, draw()) for _ in range(count))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What became of an operation.

    Attributes:
        us: until the last rank is done.
        wire_gb_s: rows that a rank sends in this time, the mean of all.
        rows: of each message: by source, chunk, and turn of the destination.
        started: when its sender took its buffer, us.
        credited: when the sender may use the buffer again, us.
    """

    us: float
    wire_gb_s: float
    rows: bytearray
    started: Sequence[float]
    credited: Sequence[float]


class _Rail(abc.ABC):
    """Message `m` is number `m % units` of source `m // units`: chunk by chunk, turn by turn.

    At turn `k` domain `s` sends to domain `(s + 1 + k) % N`.
    """

    conditions_of_message = 0  # beside a credit

    def __init__(self, problem: Problem, design: Design, machine: Machine, seed: int) -> None:
        if problem.num_tokens % design.chunk_tokens:
            raise ValueError(f"{problem.num_tokens} tokens are no whole number of rail chunks")
        self.problem, self.design, self.machine = problem, design, machine
        self.domains, self.others = problem.num_domains, problem.num_domains - 1
        self.chunks = problem.num_tokens // design.chunk_tokens
        self.units = self.chunks * self.others
        self.warps = min(design.rail_senders * design.num_sms, self.units)
        self.in_window = design.window * self.others
        count = self.domains * self.units
        self.rows = sampled_rows(problem, design.chunk_tokens, count, seed)
        self.missing = bytearray(  # conditions that a message still waits for
            self.conditions_of_message + (m % self.units >= self.in_window) for m in range(count)
        )
        self.met = array("d", [0.0]) * count  # when the last of the others was met
        self.idle = array("d", [-1.0]) * count  # since when a warp waits with the message
        self.started = array("d", [math.inf]) * count
        self.credited = array("d", [math.inf]) * count
        self.events: list[tuple[float, int]] = []  # when, and 2 m: packed, or 2 m + 1: arrives
        draw = random.Random(-1 - seed).random
        self.begin = [design.skew_us * draw() for _ in range(self.domains)]
        self.egress, self.ingress = self.begin[:], [0.0] * self.domains
        self.slower = [1 / design.slow_nic] + [1.0] * self.others
        self.end = 0.0
        self.row_bytes = problem.row_bytes(fp8=design.fp8)
        header = RINGS["kMessageHeaderBytes"]
        self.wire_us = self.by_rows(header / machine.nic_gb_s / 1e3, self.link_us(machine.nic_gb_s))
        self.link_row_us = self.link_us(machine.link_gb_s) * problem.away
        self.prepare()

    def link_us(self, gb_s: float) -> float:
        """Of a row."""
        return self.row_bytes / gb_s / 1e3

    def by_rows(self, fixed: float, of_row: float) -> list[float]:
        """Times of messages, by how many rows they have."""
        return [fixed + rows * of_row for rows in range(self.design.chunk_tokens + 1)]

    def run(self) -> Result:
        for source, begin in enumerate(self.begin):
            for warp in range(self.warps):
                self.take(source * self.units + warp, begin)
        events = self.events
        while events:
            now, event = heapq.heappop(events)
            if event & 1:
                self.arrive(event >> 1, now)
            else:
                self.post(event >> 1, now)
        sent = sum(self.rows) * self.row_bytes / self.domains
        return Result(
            us=self.end,
            wire_gb_s=sent / self.end / 1e3,
            rows=self.rows,
            started=self.started,
            credited=self.credited,
        )

    def take(self, m: int, now: float) -> None:
        """A warp has nothing to do but this message."""
        if self.missing[m]:
            self.idle[m] = now
        else:
            self.start(m, max(now, self.met[m]))

    def meet(self, m: int, at: float) -> None:
        """One of the message's conditions is met."""
        self.met[m] = max(self.met[m], at)
        self.missing[m] -= 1
        if not self.missing[m] and self.idle[m] >= 0:
            self.start(m, max(self.idle[m], self.met[m]))

    def start(self, m: int, at: float) -> None:
        self.started[m] = at
        heapq.heappush(self.events, (at + self.pack_us[self.rows[m]], 2 * m))

    def post(self, m: int, now: float) -> None:
        """The message is packed: the NIC has it, and the warp goes on."""
        source, number = divmod(m, self.units)
        begin = max(now, self.egress[source]) + self.machine.message_us
        self.egress[source] = begin + self.wire_us[self.rows[m]] * self.slower[source]
        heapq.heappush(self.events, (begin + self.machine.hop_us, 2 * m + 1))
        if number + self.warps < self.units:
            self.take(m + self.warps, now)

    def arrive(self, m: int, now: float) -> None:
        """Its first bytes do; it is there with the last."""
        source, number = divmod(m, self.units)
        chunk, turn = divmod(number, self.others)
        domain = (source + 1 + turn) % self.domains
        wire_us = self.wire_us[self.rows[m]]
        at = max(now, self.ingress[domain]) + wire_us * self.slower[domain]
        self.ingress[domain] = at
        at = max(at, now + wire_us * self.slower[source])
        self.deliver(domain, chunk, turn, at)

    def credit(self, m: int, at: float) -> None:
        """All has been read, and the credit is under way from then on."""
        at += self.machine.hop_us
        self.credited[m] = at
        if m % self.units + self.in_window < self.units:
            self.meet(m + self.in_window, at)

    pack_us: list[float]

    @abc.abstractmethod
    def prepare(self) -> None:
        """Before the first event."""

    @abc.abstractmethod
    def deliver(self, domain: int, chunk: int, turn: int, at: float) -> None:
        """Message `turn` of a chunk, by its source's count, has come to a domain."""


class _Dispatch(_Rail):
    def prepare(self) -> None:
        problem, design, machine = self.problem, self.design, self.machine
        hidden, parts = problem.hidden, RINGS["kRailChunkParts"]
        pack = machine.move_us(hidden, machine.quantize_instructions if design.fp8 else None)
        self.pack_us = self.by_rows(
            machine.poll_us + machine.scan_us + machine.release_us + machine.post_us, pack
        )
        # A rank takes parts of the messages of all its domain's rails.
        expand = machine.move_us(hidden, machine.restore_instructions if design.fp8 else None)
        part_us = 2 * machine.poll_us + machine.load_us + machine.release_us
        row_us = expand * problem.holders / problem.domain_ranks
        self.part_us = self.by_rows(part_us, row_us / parts)
        warps = design.receivers * design.num_sms - 2 * design.relays
        self.pull_us = [
            max(
                rows * problem.holders * self.link_row_us,
                us * parts * problem.domain_ranks / warps,
            )
            for rows, us in enumerate(self.part_us)
        ]
        # As many warps send to the own domain as by the rail.
        wanted = problem.num_tokens * problem.of_domain
        sent_us = wanted * pack / (design.rail_senders * design.num_sms)
        of_row = max(self.link_row_us, expand / warps)
        received_us = wanted * problem.holders * of_row
        if design.domain_first:
            self.pulled = [begin + max(sent_us, received_us) for begin in self.begin]
        else:
            self.pulled = self.begin[:]
            self.pull_us = [us + received_us / self.units for us in self.pull_us]
        self.end = max(self.begin) + sent_us
        self.relayed = [self.begin[d] for d in range(self.domains) for _ in range(design.relays)]
        self.crediting = self.relayed[:]
        self.delivered = array("d", [math.inf]) * len(self.rows)  # by domain, in order of relaying
        self.next = [0] * self.domains
        self.relay_us = machine.poll_us + machine.release_us
        self.credit_us = machine.poll_us + machine.post_us

    def deliver(self, domain: int, chunk: int, turn: int, at: float) -> None:
        place = turn if self.design.relays_as_sent else self.others - 1 - turn
        delivered, first = self.delivered, domain * self.units
        delivered[first + chunk * self.others + place] = at
        number = self.next[domain]
        while number < self.units and delivered[first + number] < math.inf:
            self.relay(domain, number, delivered[first + number])
            number += 1
        self.next[domain] = number

    def relay(self, domain: int, number: int, at: float) -> None:
        """In this order it is relayed, pulled, and given credit for."""
        chunk, place = divmod(number, self.others)
        turn = place if self.design.relays_as_sent else self.others - 1 - place
        source = (domain - 1 - turn) % self.domains
        m = source * self.units + chunk * self.others + turn
        rows = self.rows[m]
        warp = domain * self.design.relays + number % self.design.relays
        at = self.relayed[warp] = max(at, self.relayed[warp]) + self.relay_us
        at += self.machine.flag_us
        self.pulled[domain] = max(at, self.pulled[domain]) + self.pull_us[rows]
        at = max(self.pulled[domain], at + self.part_us[rows])
        self.end = max(self.end, at)
        at = max(at + self.machine.flag_us, self.crediting[warp]) + self.credit_us
        self.crediting[warp] = at
        self.credit(m, at)


class _Combine(_Rail):
    conditions_of_message = 1  # that its unit has been gathered

    def prepare(self) -> None:
        problem, design, machine = self.problem, self.design, self.machine
        add, parts = machine.add_us(problem.hidden), RINGS["kRailChunkParts"]
        self.pack_us = self.by_rows(
            2 * machine.poll_us + machine.release_us + machine.post_us, problem.holders * add
        )
        pushed = problem.holders / problem.domain_ranks * problem.experts_of_holder
        self.push_us = self.by_rows(
            machine.poll_us + machine.scan_us + machine.release_us, pushed * add
        )
        # What the own domain sends shares the link with them.
        with_own = problem.num_domains / self.others
        self.gather_us = self.by_rows(0.0, problem.holders * self.link_row_us * with_own)
        # Each rank pushes to all rails of its domain.
        pushers = max(1, design.rail_senders * design.num_sms // problem.domain_ranks)
        self.pushers = [[begin] * pushers for begin in self.begin]
        self.gathered = self.begin[:]
        self.next_unit = [0] * self.domains
        self.freed = array("d", [math.inf]) * len(self.rows)
        terms = problem.num_ranks * problem.of_rank / problem.num_domains + problem.remote_domains
        self.sum_us = (
            machine.poll_us + design.chunk_tokens / parts * terms * add + machine.release_us
        )
        self.credit_us = self.others * machine.post_us
        receivers = max(1, design.receivers * design.num_sms // parts)
        self.receivers = [[begin] * receivers for begin in self.begin]
        self.arrived = [[0] * self.chunks for _ in range(self.domains)]
        self.complete = [[0.0] * self.chunks for _ in range(self.domains)]

    def run(self) -> Result:
        for source in range(self.domains):
            self.push(source)
        return super().run()

    def push(self, source: int) -> None:
        """Units are pushed in their order, as buffers of the ring of sums get free."""
        number, units, first = self.next_unit[source], self.design.units, source * self.units
        while number < self.units:
            freed = self.freed[first + number - units] if number >= units else 0.0
            if freed == math.inf:
                break
            rows, warps = self.rows[first + number], self.pushers[source]
            done = max(warps[0], freed) + self.push_us[rows]
            heapq.heapreplace(warps, done)
            self.gathered[source] = max(self.gathered[source] + self.gather_us[rows], done)
            self.next_unit[source] = number + 1
            self.meet(first + number, self.gathered[source] + self.machine.flag_us)
            number += 1

    def post(self, m: int, now: float) -> None:
        self.freed[m] = now + self.machine.release_us + self.machine.flag_us
        super().post(m, now)
        self.push(m // self.units)

    def deliver(self, domain: int, chunk: int, turn: int, at: float) -> None:
        complete, arrived = self.complete[domain], self.arrived[domain]
        complete[chunk] = max(complete[chunk], at)
        arrived[chunk] += 1
        if arrived[chunk] < self.others:
            return
        warps = self.receivers[domain]
        read = max(warps[0], complete[chunk]) + self.sum_us
        self.end = max(self.end, read)
        heapq.heapreplace(warps, read + self.credit_us)
        for sent in range(self.others):
            source = (domain - 1 - sent) % self.domains
            at = read + (self.others - sent) * self.machine.post_us
            self.credit(source * self.units + chunk * self.others + sent, at)


def simulate(
    problem: Problem, design: Design, machine: Machine | None = None, seed: int = 1
) -> Result:
    """Predicts one operation."""
    rail = _Dispatch if design.operation == "dispatch" else _Combine
    return rail(problem, design, machine or Machine(), seed).run()
