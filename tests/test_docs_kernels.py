# SPDX-License-Identifier: Apache-2.0
"""docs/design/protocol.md and docs/design/kernels.md say what the kernels' sources say."""

import dataclasses
import importlib
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"

pytestmark = pytest.mark.skipif(not CSRC.exists(), reason="the C++ sources are not here")


def _tool(folder, name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools" / folder))
    sys.modules.pop(name, None)
    return importlib.import_module(name)


@pytest.fixture
def heap_table(monkeypatch):
    return _tool("docs", "heap_table", monkeypatch)


@pytest.fixture
def traffic(monkeypatch):
    return _tool("docs", "kernel_traffic", monkeypatch)


@pytest.fixture
def lint(monkeypatch):
    return _tool("lint", "check_memory_order", monkeypatch)


# --- the heap ----------------------------------------------------------------------------------


def test_the_table_of_the_heap_is_up_to_date(heap_table):
    page = (ROOT / "docs" / "design" / "protocol.md").read_text()
    assert page == heap_table.page(), "run python tools/docs/heap_table.py"


def test_the_table_says_which_regions_no_peer_writes(heap_table):
    used_by = {
        row.split("|")[1].strip(" `"): row.split("|")[2].strip()
        for row in heap_table.text().splitlines()
        if row.startswith("| `")
    }
    own = {name for name, who in used_by.items() if who == "the rank alone"}
    assert own == {"counts", "totals"}
    assert {used_by[name] for name in used_by.keys() - own} == {"peers too"}


def test_a_header_that_marks_no_region_as_the_ranks_own_is_an_error(
    heap_table, monkeypatch, tmp_path
):
    header = heap_table.HEADER.read_text()
    other = tmp_path / "heap_layout.h"
    other.write_text(header.replace("kFirstOwnRegion", "kFirstOfTheRank"))
    monkeypatch.setattr(heap_table, "HEADER", other)
    heap_table.constants.cache_clear()
    with pytest.raises(ValueError, match="not written as this script reads them"):
        heap_table.regions()


def test_a_heap_of_odd_sizes_is_as_large_as_make_heap_layout_says(heap_table):
    shape = heap_table.HeapShape(6, 30, 5, 1001, 333, 4)
    sizes = list(heap_table.region_bytes(shape).values())
    assert sizes[:7] == [48, 4, 48, 393216, 120120, 120120, 8072064]
    assert sizes[7:] == [0, 0, 0, 46080, 120]
    assert heap_table.heap_bytes(shape) == 8753152
    low_latency = dataclasses.replace(shape, low_latency_tokens=9)
    sizes = list(heap_table.region_bytes(low_latency).values())
    assert sizes[7:] == [3072, 5760, 387072, 46080, 120]
    assert heap_table.heap_bytes(low_latency) == 9149184


def test_the_page_has_the_chunks_and_tiles_of_the_example(heap_table):
    page = (ROOT / "docs" / "design" / "kernels.md").read_text()
    tokens, ranks = heap_table.EXAMPLE.max_tokens, heap_table.EXAMPLE.num_ranks
    chunk = heap_table.chunk_tokens(tokens)
    tile = heap_table.tile_tokens(tokens, ranks)
    words = (
        f"At `T` {tokens} and `R` {ranks} a chunk has {chunk} tokens, of {tokens // chunk} chunks"
    )
    assert words in page
    assert f"a tile has {tile}." in page


# --- bytes and bounds --------------------------------------------------------------------------


def test_the_tables_of_bytes_are_up_to_date(traffic):
    page = (ROOT / "docs" / "design" / "kernels.md").read_text()
    assert page == traffic.page(), "run python tools/docs/kernel_traffic.py"


def test_a_token_goes_to_as_many_ranks_as_counting_says(traffic):
    # R 2, E 4, K 2: of the 6 pairs of experts 4 lie on both ranks.
    assert traffic.Problem(num_ranks=2, num_experts=4, num_topk=2).distinct_ranks == pytest.approx(
        (4 * 2 + 2 * 1) / 6
    )
    one = traffic.Problem(num_ranks=1, num_experts=4, num_topk=2)
    assert one.distinct_ranks == 1
    assert one.away == 0


def test_the_bounds_in_the_text_are_those_of_the_tables(traffic):
    page = (ROOT / "docs" / "design" / "kernels.md").read_text()
    for operation in ("dispatch, FP8 wire", "combine, BF16"):
        assert f"**{traffic.link_microseconds(traffic.EXAMPLE, operation):.0f} µs**" in page
    ratios = [
        traffic.link_microseconds(traffic.EXAMPLE, operation)
        / traffic.memory_microseconds(traffic.EXAMPLE, operation)
        for operation in traffic.memory_steps(traffic.EXAMPLE)
    ]
    assert min(ratios) > 2
    assert max(ratios) < 3.25, "the page says: by a factor of two to three"


def test_the_page_has_the_warps_that_are_compiled():
    page = (ROOT / "docs" / "design" / "kernels.md").read_text()
    configs = (CSRC / "tuning" / "warps_and_stages.h").read_text()
    (few, bins), (many, _) = re.findall(r"{\.num_warps = (\d+), \.max_bins = ([^}]*)}", configs)
    assert f"| plan, up to {int(bins):,} bins | {few} |" in page
    assert f"| plan, more | {many} |" in page
    transfers = dict(re.findall(r"kCompiled(\w+){\.num_warps = (\d+), \.num_stages", configs))
    assert f"| dispatch | {transfers.pop('Dispatch')} |" in page
    assert f"| combine | {transfers.pop('Combine')} |" in page
    between_domains = (ROOT / "docs" / "design" / "internode.md").read_text()
    dispatch, combine = (transfers.pop(f"Internode{name}") for name in ("Dispatch", "Combine"))
    assert f"{dispatch} warps in dispatch, {combine} in combine" in between_domains
    dispatch, combine = (transfers.pop(f"FarLowLatency{name}") for name in ("Dispatch", "Combine"))
    assert f"{dispatch} warps in dispatch and {combine} in combine" in between_domains
    low_latency = (ROOT / "docs" / "design" / "low_latency.md").read_text()
    assert transfers.keys() == {"LowLatencyDispatch", "LowLatencyCombine"}
    (warps,) = set(transfers.values())
    assert f"a block has {warps} warps" in low_latency


# --- memory order ------------------------------------------------------------------------------


def test_the_kernels_memory_order_is_documented(lint, capsys):
    assert lint.main() == 0, capsys.readouterr().err


def test_the_lint_misses_nothing(lint):
    header = CSRC / "device" / "sample.h"
    bad = {
        "  st_release<Scope::kSys>(flag, 1);": "no RELEASE(name)",
        "  wait_until_reached<Scope::kGpu>(view, word, 1, site, what);": "no ACQUIRE(name)",
        "  const int* __restrict__ x;": "__restrict__",
        "  y = __ldg(x);": "__ldg",
        "  volatile int z;": "volatile",
        "  if (threadIdx.x == 0) return;": "threadIdx",
        "  __syncthreads();": "__syncthreads",
        "  v = __shfl_xor_sync(m, v, 1);": "__shfl_xor_sync",
        "  atomicAdd(p, 1);": "atomicAdd",
        "#include <cuda/atomic>": "<cuda/",
    }
    for line, finding in bad.items():
        found = list(lint.file_findings(header, [line]))
        assert any(finding in text for text in found), line
    good = ["// RELEASE(flag): the rows.", "st_release<Scope::kSys>(flag, 1);  // no atomicAdd"]
    assert not list(lint.file_findings(header, good))


def test_the_lint_demands_pairs_and_rows(lint):
    page = "\n| `rows` | a | b |\n"
    assert not list(lint.tag_findings({"RELEASE": {"rows"}, "ACQUIRE": {"rows"}}, page))
    assert list(lint.tag_findings({"RELEASE": {"rows"}, "ACQUIRE": set()}, page))
    assert list(lint.tag_findings({"RELEASE": set(), "ACQUIRE": {"rows"}}, page))
    assert list(lint.tag_findings({"RELEASE": {"flag"}, "ACQUIRE": {"flag"}}, page))
