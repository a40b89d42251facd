# SPDX-License-Identifier: Apache-2.0
"""A model of dispatch and combine between domains: predictions to 1,024 ranks, nothing measured.

The model is ep_bench/rail_model.py; this prints its tables, or writes them into the page that says
what is modeled, docs/measurements/internode_model.md.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import ep_bench  # noqa: F401
from ep_bench.rail_model import (
    Design,
    Machine,
    Problem,
    larger_design,
    product_design,
    simulate,
)
from marked_part import replaced, table

MARK = "benchmarks/internode_model.py"
DOMAINS = (2, 4, 8, 16, 32, 64, 128)
ANY_DOMAIN_TOO = (8, 128)  # here also routing without groups


def problems(domains: Sequence[int]) -> list[Problem]:
    """The rows of the table."""
    return [
        Problem(num_domains=n, num_groups=groups)
        for n in domains
        for groups in ((4, n) if n in ANY_DOMAIN_TOO else (4,))
    ]


def row(problem: Problem) -> tuple[str, ...]:
    """A row of the table."""
    n = problem.num_domains
    built, larger = product_design(n, "dispatch"), larger_design(n, "dispatch")

    def megabytes(of: Callable[..., float]) -> str:
        return " / ".join(f"{of(fp8=fp8) / 1e6:.0f}" for fp8 in (True, False))

    def predicted(design: Design) -> str:
        result = simulate(problem, design)
        return f"{result.us:.0f} ({result.wire_gb_s:.1f})"

    return (
        f"{n} / {problem.num_ranks}",
        f"{problem.num_experts}",
        "any" if problem.num_groups >= n else f"{problem.num_groups} domains",
        f"{problem.remote_domains:.2f}",
        megabytes(problem.network_bytes),
        megabytes(problem.link_bytes),
        f"{built.chunk_tokens}, {built.window}, {built.units}",
        predicted(built),
        predicted(product_design(n, "combine")),
        f"{larger.window}, {larger.units}",
        predicted(larger),
        predicted(larger_design(n, "combine")),
    )


HEADER = (
    "`N` / `R`",
    "`E`",
    "routing",
    "other domains of a token",
    "network MB, FP8 / BF16",
    "NVLink MB",
    "`Q`, `W`, `U`",
    "dispatch µs (GB/s)",
    "combine",
    "larger: `W`, `U`",
    "dispatch",
    "combine",
)


def line(num_domains: int, operation: str, key: str, values: Sequence, **other: Any) -> str:
    """GB/s on the wire for some values of a field of the design or the machine.

    Args:
        num_domains: `N`.
        operation: "dispatch FP8", "dispatch BF16" or "combine BF16".
        key: of Design or Machine.
        values: the field's.
        other: further fields of the design.
    """
    problem = Problem(num_domains=num_domains)
    name, wire = operation.split()
    built = dataclasses.replace(product_design(num_domains, name), fp8=wire == "FP8", **other)
    found = []
    for value in values:
        changed: Any = {key: value}
        if key in Machine.__dataclass_fields__:
            result = simulate(problem, built, Machine(**changed))
        else:
            result = simulate(problem, dataclasses.replace(built, **changed))
        found.append(f"{value} → {result.wire_gb_s:.1f}")
    at = "".join(f", `{name}` {value}" for name, value in other.items())
    return f"* {operation}, `N` {num_domains}{at}; `{key}` {', '.join(found)}"


def lines() -> str:
    """What the results depend on."""
    fp8, bf16, combine = "dispatch FP8", "dispatch BF16", "combine BF16"
    return "\n".join(
        [
            line(2, fp8, "window", (8, 16, 32, 64, 128)),
            line(8, fp8, "window", (5, 10, 20), relays=4),
            line(2, combine, "window", (8, 16, 32)),
            line(32, combine, "window", (3, 6, 12), units=64),
            line(32, combine, "units", (8, 16, 32, 64), window=6),
            line(32, fp8, "relays", (1, 2, 4, 8)),
            line(32, bf16, "relays", (1, 2, 4, 8)),
            line(2, bf16, "domain_first", (True, False)),
            line(2, bf16, "link_gb_s", (120, 200, 334)),
            line(8, fp8, "num_sms", (8, 16, 24), window=20, relays=4),
            line(8, bf16, "num_sms", (4, 8, 16, 24)),
            line(8, combine, "num_sms", (4, 8, 16, 24)),
            line(8, combine, "message_us", (0.05, 1, 2, 4)),
            line(8, combine, "hop_us", (3, 10, 30)),
            line(8, combine, "slow_nic", (1, 0.75, 0.5)),
            line(8, combine, "skew_us", (0, 200, 1000)),
        ]
    )


def text(domains: Sequence[int]) -> str:
    """The table and the lines."""
    rows = [row(problem) for problem in problems(domains)]
    return f"{table(HEADER, rows)}\n\nGB/s on the wire, all else as in the table:\n\n{lines()}"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--nodes", type=int, nargs="+", default=DOMAINS, choices=DOMAINS, help="rows; default: all"
    )
    parser.add_argument(
        "--markdown", type=pathlib.Path, metavar="OUT", help="write into this page, between markers"
    )
    args = parser.parse_args(argv)
    if args.markdown and tuple(args.nodes) != DOMAINS:
        parser.error("a page gets all rows")
    return args


def main() -> None:
    """Prints the table, or writes it into a page."""
    args = parse_args()
    if args.markdown is None:
        print(f"MODEL: predicted, no network has been measured.\n\n{text(args.nodes)}")
        return
    page = args.markdown.read_text()
    args.markdown.write_text(replaced(page, MARK, text(args.nodes)))


if __name__ == "__main__":
    main()
