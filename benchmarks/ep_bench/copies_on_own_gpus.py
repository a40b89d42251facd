# SPDX-License-Identifier: Apache-2.0
"""Measures dispatch, experts and combine under Zipf routing, with and without copies of experts.

With a GPU for each rank. Plans are made from other tokens than those that are measured; where these
go is checked against the oracle. docs/guide/balancing.md has the numbers, `expert_copies` says what
the experts do here.
"""

import argparse
import json
import os
import sys
from typing import Any

from ep_bench import environment, expert_copies, on_own_gpus, on_ranks
from ep_bench.cases import NUM_EXPERTS
from ep_bench.expert_copies import KINDS, CopiesCase
from ep_launch.ranks import Case

TOKENS = (4096, 1024)
FFN = 2048
NUM_SAMPLES, LENGTH = 50, 10
# On CPU devices: does it run at all?
SMOKE = {"num_experts": 8, "num_topk": 2, "hidden": 32, "ffn": 16, "spares": (1, 2)}
SMOKE_TOKENS, SMOKE_SAMPLES, SMOKE_LENGTH = 32, 2, 2


def check(args: argparse.Namespace) -> None:
    """Fills in ranks, tokens and placement, as for what `on_own_gpus` measures.

    Raises:
        ValueError: something is wrong with them; the message has the option.
    """
    on_own_gpus.check_ranks(args, TOKENS, SMOKE_TOKENS, NUM_EXPERTS)
    for option in ("full", "link_probe", "markdown", "plot"):
        if getattr(args, option):
            raise ValueError(f"--{option.replace('_', '-')} is not for --copies")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all cases in one set of processes; the numbers, written whenever there are more."""
    sizes = SMOKE if args.smoke else {"ffn": args.ffn or FFN}
    cases = [
        CopiesCase(num_tokens=tokens, num_ranks=args.ranks, kind=kind, **sizes)
        for tokens in args.tokens
        for kind in KINDS
    ]
    how_often = {
        "num_samples": SMOKE_SAMPLES if args.smoke else NUM_SAMPLES,
        "length": SMOKE_LENGTH if args.smoke else LENGTH,
    }
    found: dict[str, Any] = {
        "environment": {} if args.smoke else environment.describe_gpu(args.commit),
        "lines": [],
    }

    def add(index: int, values: list[Any]) -> None:
        found["lines"] += expert_copies.summary(cases[index], values)
        print(f"measured: {cases[index].name}", file=sys.stderr, flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(found, indent=1) + os.linesep)

    work = [Case(c.name, expert_copies.measure, {"case": c, **how_often}) for c in cases]
    variables = {"JAX_PLATFORMS": "cpu"} if args.smoke else {}
    on_ranks.run_on_ranks(work, args.ranks, args.placement, variables, add)
    return found
