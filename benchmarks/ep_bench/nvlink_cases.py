# SPDX-License-Identifier: Apache-2.0
"""What is measured with a GPU for each rank."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from ep_bench.cases import Inputs
from ep_bench.checks import Expected
from ep_bench.gpu_bytes import ROW
from ep_bench.gpu_cases import FP8, GpuCase

TOKENS = (128, 1024, 4096, 8192)
SMS = (24, 8, 16, 32)  # the first: of comparisons, and of the goals
ROUTINGS = ("uniform", "zipf")
MEASURED = ("plan", "dispatch", "combine")  # of our operations
# Ways to dispatch and combine -> how tables call them.
OURS = {"ours": "jax_ep", "ours_fp8": "jax_ep, FP8 wire"}
BASELINES = {
    "gather_scatter": "all-gather + reduce-scatter",
    "all_to_all": "capacity all_to_all",
    "ragged_all_to_all": "ragged_all_to_all",
    "ragged_with_flags": "ragged_all_to_all, with flags",
}
COMPARED = OURS | BASELINES
RAGGED_FLAGS = (
    "--xla_gpu_experimental_ragged_all_to_all_use_device_kernel=true "
    "--xla_gpu_experimental_enable_nccl_symmetric_buffers=true"
)
# Of a rank's buckets: what arrives, and what goes back, are as large again.
MOST_BUCKET_BYTES = 8e9
MOST_CONFIRMED = 1024


def cases(num_ranks: int, num_tokens: int, *, full: bool) -> list[GpuCase]:
    """Of one number of tokens: both wires and routings; other SMs at T 4096, or `full` everywhere.

    The first two, uniform and zipf on the BF16 wire, are those of the comparisons too.
    """
    kinds = [(SMS[0], wire, routing) for wire, routing in itertools.product((None, FP8), ROUTINGS)]
    if full:
        kinds += itertools.product(SMS[1:], (None, FP8), ROUTINGS)
    elif num_tokens == 4096:
        kinds += itertools.product(SMS[1:], (None, FP8), ROUTINGS[:1])
    return [
        GpuCase(
            num_tokens=num_tokens,
            num_ranks=num_ranks,
            num_sms=sms,
            wire_dtype=wire,
            routing=routing,
        )
        for sms, wire, routing in kinds
    ]


def compared_in(case: GpuCase) -> list[str]:
    """What runs in one program with a case: all but the ragged ones, which may fail."""
    fits = case.num_experts * case.bucket_capacity * ROW <= MOST_BUCKET_BYTES
    return [*OURS, "gather_scatter", *(["all_to_all"] if fits else [])]


def confirm(case: GpuCase) -> None:
    """Has the oracle confirm what results are compared with, on four channels.

    It is slow, and GPUs wait for it: of more tokens than `MOST_CONFIRMED`, a case with so many.

    Raises:
        WrongResultError: it does not, or rows would be dropped.
    """
    case = dataclasses.replace(case, num_tokens=min(case.num_tokens, MOST_CONFIRMED))
    rng = np.random.default_rng(3)
    total = case.num_ranks * case.num_tokens
    topk_idx = case.topk_idx.reshape(total, -1)
    x, out_bar = rng.standard_normal((2, total, 4), np.float32)
    weights = rng.uniform(0.1, 1.0, topk_idx.shape).astype(np.float32)
    inputs = Inputs(x=x, topk_idx=topk_idx, topk_weights=weights, out_bar=out_bar)
    Expected.of(case, inputs, "float32")


def routings_of(found: Sequence[GpuCase]) -> list[GpuCase]:
    """One case for each routing, on the BF16 wire, with the first number of SMs."""
    return [c for c in found if c.wire_dtype is None and c.num_sms == SMS[0]]
