# SPDX-License-Identifier: Apache-2.0
"""Writes the table of the heap's regions into docs/design/protocol.md.

The regions, what they hold and their sizes are read from the text of csrc/core/heap_layout.h, so it
needs neither a compiler nor CUDA. The functions that the header's formulas call, which are those
of csrc/core/work_partition.h, are repeated here.
"""

import ast
import dataclasses
import functools
import re
import sys

import marked_part

HEADER = marked_part.ROOT / "csrc" / "core" / "heap_layout.h"
PARTITION = marked_part.ROOT / "csrc" / "core" / "work_partition.h"
LOW_LATENCY = marked_part.ROOT / "csrc" / "core" / "low_latency_protocol.h"
PROTOCOL = marked_part.ROOT / "csrc" / "core" / "protocol.h"
PAGE = marked_part.ROOT / "docs" / "design" / "protocol.md"
SCRIPT = "tools/docs/heap_table.py"

_REGION = re.compile(r"^  k(\w+), +// (\w+(?: \[[^\]]*\])?): (.*)$", re.MULTILINE)
_CONSTANT = re.compile(r"^inline constexpr u?int\d+_t (k\w+) = (\d+);", re.MULTILINE)
_FIRST_OWN = re.compile(r"kFirstOwnRegion = static_cast<int32_t>\(Region::k(\w+)\);")
# Names of the header's formulas -> those of the page.
_LETTERS = {
    "ranks": "R",
    "neighbors": "R",
    "gathered": "R",
    "tokens": "max_tokens",
    "topk": "K",
    "layout.row_stride": "row_stride",
    "layout.expert_packets": "expert_packets",
    "layout.scalar_packets": "scalar_packets",
    "layout.row_packets": "row_packets",
    "max_num_tiles(max_tokens, shape.num_ranks)": "tiles",
}


@dataclasses.dataclass(frozen=True)
class HeapShape:
    """As in the header, with the bytes of an element and the bins instead of enums."""

    num_ranks: int
    num_experts: int
    num_topk: int
    max_tokens: int
    hidden: int
    element_bytes: int
    low_latency_tokens: int = 0


EXAMPLE = HeapShape(8, 256, 8, 4096, 7168, 2, 128)


@dataclasses.dataclass(frozen=True)
class Region:
    """A region.

    Attributes:
        name: as the page has it.
        shape: what an element is, and how many there are.
        holds: what it holds.
        formula: its bytes.
        own: whether the rank alone uses it, and no peer writes there.
    """

    name: str
    shape: str
    holds: str
    formula: str
    own: bool


def ceil_div(a: int, b: int) -> int:
    """Returns a / b, rounded up."""
    return -(-a // b)


def align_up(value: int, alignment: int) -> int:
    """Returns the least multiple of `alignment` that is at least `value`."""
    return ceil_div(value, alignment) * alignment


@functools.cache
def constants() -> dict[str, int]:
    """Returns the integer constants of the headers by name."""
    text = "".join(header.read_text() for header in (HEADER, PARTITION, PROTOCOL, LOW_LATENCY))
    return {name: int(value) for name, value in _CONSTANT.findall(text)}


def chunk_tokens(num_tokens: int) -> int:
    """Returns the tokens of a chunk of dispatch."""
    most = constants()["kMaxDispatchChunkTokens"]
    few = min(max(ceil_div(num_tokens, constants()["kChunkTarget"]), 1), most)
    return max(few, ceil_div(num_tokens, constants()["kMaxChunks"]))


def max_tiles(num_ranks: int) -> int:
    """Returns the most tiles of a source, however many tokens there are."""
    return min(512 // num_ranks, constants()["kMaxTiles"])


def tile_tokens(num_tokens: int, num_ranks: int) -> int:
    """Returns the tokens of a tile."""
    unit = constants()["kTileUnit"]
    return max(align_up(ceil_div(num_tokens, max_tiles(num_ranks)), unit), unit)


def max_num_tiles(max_tokens: int, num_ranks: int) -> int:
    """Returns the most tiles of a source that has at most so many tokens."""
    return min(ceil_div(max_tokens, constants()["kTileUnit"]), max_tiles(num_ranks))


def regions() -> list[Region]:
    """Returns the regions that the header declares, in its order.

    Raises:
        ValueError: if the header does not look as expected.
    """
    text = HEADER.read_text()
    body = text[text.index("enum class Region") :]
    declared = _REGION.findall(body[: body.index("};")])
    listed = re.search(r"bytes\[kNumRegions\] = \{(.*?)\n  \};", text, re.DOTALL)
    names = [name for name, _, _ in declared]
    first_own = _FIRST_OWN.search(text)
    if (
        listed is None
        or len(declared) != constants()["kNumRegions"]
        or first_own is None
        or first_own[1] not in names
    ):
        raise ValueError(f"{HEADER.name}: the regions are not written as this script reads them")
    formulas = [f.strip().rstrip(",") for f in listed[1].strip().splitlines()]
    num_of_peers = names.index(first_own[1])
    return [
        Region(
            name=re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower(),
            shape=shape,
            holds=holds,
            formula=_letters(formula),
            own=number >= num_of_peers,
        )
        for number, ((name, shape, holds), formula) in enumerate(
            zip(declared, formulas, strict=True)
        )
    ]


def _letters(formula: str) -> str:
    # int64_t{kMaxChunks} and kMaxChunks -> its value
    formula = re.sub(r"int64_t\{(\w+)\}", r"\1", formula)
    formula = re.sub(r"\bk\w+", lambda m: str(constants()[m[0]]), formula)
    for name, letter in _LETTERS.items():
        pattern = rf"(?<![\w.]){re.escape(name)}" + (r"\b" if name[-1] != ")" else "")
        formula = re.sub(pattern, letter, formula)
    return formula


def region_bytes(shape: HeapShape) -> dict[str, int]:
    """Returns the bytes of each region by name."""
    row_stride = align_up(shape.hidden * shape.element_bytes, 16)
    selections = shape.low_latency_tokens * shape.num_topk
    values = {
        "channels": constants()["kNumChannels"],
        "R": shape.num_ranks,
        "K": shape.num_topk,
        "max_tokens": shape.max_tokens,
        "row_stride": row_stride,
        "ll_tokens": shape.low_latency_tokens,
        "expert_packets": ceil_div(selections, constants()["kExpertsPerPacket"]),
        "scalar_packets": ceil_div(selections, constants()["kScalarsPerPacket"]),
        "row_packets": ceil_div(row_stride, constants()["kPacketDataBytes"]),
        "tiles": max_num_tiles(shape.max_tokens, shape.num_ranks),
        "bins": shape.num_experts,
    }
    return {region.name: _product(region.formula, values) for region in regions()}


def _product(formula: str, values: dict[str, int]) -> int:
    product = 1
    for factor in formula.split(" * "):
        product *= values[factor] if factor in values else ast.literal_eval(factor)
    return product


def heap_bytes(shape: HeapShape) -> int:
    """Returns the bytes of a heap."""
    return sum(align_up(size, 256) for size in region_bytes(shape).values())


def text() -> str:
    """Returns the table."""
    example = region_bytes(EXAMPLE)
    rows = [
        (
            f"`{region.name}`",
            "the rank alone" if region.own else "peers too",
            f"{region.shape}: {region.holds}",
            f"`{region.formula}`",
            f"{example[region.name]:,}",
        )
        for region in regions()
    ]
    rows.append(("the heap", "", "", "", f"{heap_bytes(EXAMPLE):,}"))
    header = ("region", "used by", "what it holds", "bytes", "example")
    return marked_part.table(header, rows)


def page() -> str:
    """Returns docs/design/protocol.md with the table as it should be."""
    return marked_part.replaced(PAGE.read_text(), SCRIPT, text())


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}", file=sys.stderr)
