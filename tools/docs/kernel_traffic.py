# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of bytes and bounds into docs/design/kernels.md.

Counts what one rank moves in one operation, on average over routings in which each token selects K
of E experts, all sets alike, and no row is dropped.
"""

import dataclasses
import math
import sys

import marked_part

PAGE = marked_part.ROOT / "docs" / "design" / "kernels.md"
SCRIPT = "tools/docs/kernel_traffic.py"

# Of an H200: NVLink in one direction, as comparable libraries reach it of the nominal 450 GB/s,
# and the nominal bandwidth of its memory.
LINK_BYTES_PER_S = 380e9
MEMORY_BYTES_PER_S = 4.8e12


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes of an operation; rows are bfloat16 outside, layout is "expert"."""

    num_ranks: int = 8
    num_experts: int = 256
    num_topk: int = 8
    num_tokens: int = 4096
    hidden: int = 7168

    @property
    def share(self) -> float:
        """Of all ranks, those that a token goes to: 1 - C(E - E/R, K) / C(E, K)."""
        elsewhere = self.num_experts - self.num_experts // self.num_ranks
        missed = math.comb(elsewhere, self.num_topk) / math.comb(self.num_experts, self.num_topk)
        return 1 - missed

    @property
    def distinct_ranks(self) -> float:
        """To which a token goes, its own among them."""
        return self.num_ranks * self.share

    @property
    def away(self) -> float:
        """Rows that a rank sends to others; as many come from them."""
        return self.num_tokens * (self.num_ranks - 1) * self.share

    @property
    def home(self) -> float:
        """Rows that a rank sends to itself."""
        return self.num_tokens * self.share

    @property
    def held(self) -> int:
        """Rows of a receive buffer that hold a token."""
        return self.num_tokens * self.num_topk

    @property
    def row(self) -> int:
        """Bytes of a row in bfloat16."""
        return 2 * self.hidden

    @property
    def fp8_row(self) -> int:
        """Bytes of a row on the FP8 wire, with its scales."""
        return self.hidden + 4 * math.ceil(self.hidden / 128)


EXAMPLE = Problem()


def link_bytes(p: Problem) -> dict[str, tuple[str, float]]:
    """Formula and bytes that leave a rank over NVLink, by operation."""
    return {
        "plan": ("`(R - 1) * T * K * 4`", (p.num_ranks - 1) * p.num_tokens * p.num_topk * 4),
        "dispatch, BF16": ("`away * row`", p.away * p.row),
        "dispatch, FP8 wire": ("`away * fp8_row`", p.away * p.fp8_row),
        "combine, BF16": ("`away * row`", p.away * p.row),
    }


Step = tuple[str, str, float]


def memory_steps(p: Problem) -> dict[str, list[Step]]:
    """Step, formula and bytes that each step reads or writes in a rank's memory, by operation."""
    staged = p.away + p.home
    output = ("rows of the receive buffer written", "`T * K * row`", p.held * p.row)
    read_x = ("`x` read to be sent", "`T * row`", p.num_tokens * p.row)
    return {
        "dispatch, BF16": [
            read_x,
            ("arriving rows written by peers", "`away * row`", p.away * p.row),
            ("arrived rows read", "`away * row`", p.away * p.row),
            ("own rows read from `x`", "`home * row`", p.home * p.row),
            output,
        ],
        "dispatch, FP8 wire": [
            read_x,
            ("arriving rows written", "`(away + home) * fp8_row`", staged * p.fp8_row),
            ("arrived rows read", "`(away + home) * fp8_row`", staged * p.fp8_row),
            output,
        ],
        "combine, BF16": [
            ("`y` read", "`T * K * row`", p.held * p.row),
            ("arriving sums written by peers", "`away * row`", p.away * p.row),
            ("arrived sums read", "`away * row`", p.away * p.row),
            ("`out` written", "`T * row`", p.num_tokens * p.row),
        ],
    }


def link_microseconds(p: Problem, operation: str) -> float:
    """Returns the least time of an operation by what leaves a rank."""
    return link_bytes(p)[operation][1] / LINK_BYTES_PER_S * 1e6


def memory_microseconds(p: Problem, operation: str) -> float:
    """Returns the least time of an operation by what its memory moves."""
    return sum(step[2] for step in memory_steps(p)[operation]) / MEMORY_BYTES_PER_S * 1e6


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f}"


def text() -> str:
    """Returns the tables."""
    p = EXAMPLE
    links = [
        (name, formula, _mb(size), f"{link_microseconds(p, name):.0f}")
        for name, (formula, size) in link_bytes(p).items()
    ]
    memory = []
    for name, steps in memory_steps(p).items():
        memory += [(name, step, formula, _mb(size), "") for step, formula, size in steps]
        total = sum(step[2] for step in steps)
        time = f"{memory_microseconds(p, name):.0f}"
        memory.append((name, "**all**", "", f"**{_mb(total)}**", f"**{time}**"))
    return "\n".join(
        [
            f"A token goes to {p.distinct_ranks:.3f} ranks on average, of which "
            f"{p.distinct_ranks - p.share:.3f} are not its own. "
            f"`away` is {p.away:,.0f} rows, `home` {p.home:,.0f}; `row` is {p.row:,} bytes, "
            f"`fp8_row` {p.fp8_row:,}.",
            "",
            "Over NVLink, out of each rank, and as much into it:",
            "",
            marked_part.table(("operation", "bytes", "MB", "µs at 380 GB/s"), links),
            "",
            "In a rank's memory (HBM):",
            "",
            marked_part.table(("operation", "step", "bytes", "MB", "µs at 4.8 TB/s"), memory),
        ]
    )


def page() -> str:
    """Returns docs/design/kernels.md with the tables as they should be."""
    return marked_part.replaced(PAGE.read_text(), SCRIPT, text())


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}", file=sys.stderr)
