# SPDX-License-Identifier: Apache-2.0
"""What copies of popular experts are worth: dispatch, the experts' products, combine, timed.

The experts' products are three dense ones over all rows of the receive buffer, which is as large as
the busiest rank needs: the work of a grouped product that serves that rank, on all ranks, with one
expert's matrices. `jax.lax.ragged_dot` itself does the work of all experts for each row on GPUs.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tabulate import tabulate

import jax_ep
from ep_bench.cases import HIDDEN, NUM_EXPERTS, NUM_TOPK
from ep_bench.operation_programs import chained
from ep_testing.programs import over_ranks
from ep_testing.rank_programs import place

WITHOUT = "no copies"
KINDS = ("zipf", "zipf, sorted")
# With the experts' products, and without.
WHAT = ("layer", "exchange")
_ROW_TILE = 128
# Other ranks may be compiling.
_TIMEOUT_S = 100.0
# Tokens whose experts the plan is made from, on each rank; others are measured.
_PLANNED_TOKENS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopiesCase:
    """What is measured with and without copies.

    Attributes:
        num_tokens: `T`, of each rank.
        num_ranks: `R`.
        kind: "zipf": the n-th most popular expert has a weight of 1 / n, and popular ones are
            spread over the ranks at random; "zipf, sorted": they are the first ones, on rank 0.
        spares: slots of each rank beyond `E / R`, of each variant with copies.
        ffn: `F`.
        hidden: `H`.
        num_experts: `E`.
        num_topk: `K`.
    """

    num_tokens: int
    num_ranks: int
    kind: str = KINDS[0]
    spares: tuple[int, ...] = (1, 8)
    ffn: int = 2048
    hidden: int = HIDDEN
    num_experts: int = NUM_EXPERTS
    num_topk: int = NUM_TOPK

    @property
    def name(self) -> str:
        """For progress, tables and errors."""
        return f"{self.kind}, T {self.num_tokens}"

    def routing(self, num_tokens: int, seed: int) -> np.ndarray:
        """`[R, T, K]` int32, distinct experts of each token: a draw without replacement."""
        place = np.arange(self.num_experts)
        if self.kind == "zipf":
            place = np.random.default_rng(0).permutation(self.num_experts)
        shape = (self.num_ranks, num_tokens, self.num_experts)
        keys = np.random.default_rng([seed, 1]).gumbel(size=shape) - np.log(1.0 + place)
        return np.argpartition(-keys, self.num_topk, axis=-1)[..., : self.num_topk].astype(np.int32)

    @functools.cached_property
    def topk_idx(self) -> np.ndarray:
        """`[R, T, K]` int32: what is measured."""
        return self.routing(self.num_tokens, 1)

    @functools.cached_property
    def load(self) -> np.ndarray:
        """`[E]`: what plans are made from, other tokens of the same popularity."""
        seen = self.routing(min(_PLANNED_TOKENS, 8 * self.num_tokens), 2)
        return np.bincount(seen.reshape(-1), minlength=self.num_experts)

    def plan(self, spare: int) -> jax_ep.ExpertPlacement:
        """With so many spare slots on each rank."""
        slots = self.num_experts // self.num_ranks + spare
        return jax_ep.plan_placement(self.load, num_ranks=self.num_ranks, slots_per_rank=slots)

    def variants(self) -> dict[str, jax_ep.ExpertPlacement | None]:
        """By name."""
        per_rank = self.num_experts // self.num_ranks
        copies = {f"S {per_rank + spare}": self.plan(spare) for spare in self.spares}
        return {WITHOUT: None, **copies}

    def slots(self, plan: jax_ep.ExpertPlacement | None) -> np.ndarray:
        """`[R, T, K]`: where the selections go, by the oracle."""
        return self.topk_idx if plan is None else _placed(self, plan)

    def rows(self, plan: jax_ep.ExpertPlacement | None) -> np.ndarray:
        """`[R]`: selections of each rank's experts."""
        num = self.num_experts if plan is None else plan.slot_expert.shape[1]
        rank = self.slots(plan) // (num // self.num_ranks)
        return np.bincount(rank.reshape(-1), minlength=self.num_ranks)


@functools.cache
def _placed(case: CopiesCase, plan: jax_ep.ExpertPlacement) -> np.ndarray:
    return jax_ep.reference.place(case.topk_idx, plan.copies[0], plan.upper[0])


def measure(
    mesh: Mesh, case: CopiesCase, *, num_samples: int, length: int
) -> dict[str, np.ndarray]:
    """Seconds as this rank sees them, `[num_samples]`, by "variant: what".

    What: "layer" (`place`, dispatch, products, combine) and "exchange" (without products). Samples
    of the variants take turns, and ranks begin each one together.

    Args:
        mesh: of the ranks.
        case: what to measure.
        num_samples: of each.
        length: how often one is run for a sample.
    """
    with contextlib.ExitStack() as stack:
        opened = {
            name: stack.enter_context(_program(mesh, case, plan))
            for name, plan in case.variants().items()
        }
        programs = {
            f"{name}: {what}": program(what == "layer", length)
            for name, program in opened.items()
            for what in WHAT
        }
        meet = opened[WITHOUT](False, 1)
        for run in programs.values():
            for _ in range(2):
                jax.block_until_ready(run())
        found = {name: np.empty(num_samples) for name in programs}
        for sample in range(num_samples):
            for name, run in programs.items():
                jax.block_until_ready(meet())
                found[name][sample] = _seconds(run) / length
    return found


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


@contextlib.contextmanager
def _program(
    mesh: Mesh, case: CopiesCase, plan: jax_ep.ExpertPlacement | None
) -> Iterator[Callable[[bool, int], Callable[[], Any]]]:
    """What runs for a variant: with products or without, and how often in a row.

    It returns when all ranks have come.
    """
    busiest = int(case.rows(plan).max())
    config = jax_ep.EpConfig(
        num_experts=case.num_experts if plan is None else plan.slot_expert.shape[1],
        num_topk=case.num_topk,
        hidden=case.hidden,
        max_tokens_per_rank=case.num_tokens,
        recv_capacity=-(-busiest // _ROW_TILE) * _ROW_TILE,
    )
    tables = [] if plan is None else [np.asarray(t) for t in jax.tree.leaves(plan.layer(0))]
    spread = (np.stack([table] * case.num_ranks) for table in tables)
    with jax_ep.EpGroup(mesh, "expert", config, timeout=_TIMEOUT_S) as group:

        def step(products: bool, *args: jax.Array) -> jax.Array:
            x, idx, w, gate, up, down, *tables = args
            if tables:
                idx = jax_ep.place(idx, jax_ep.PlacementArrays(*tables), group=group)

            def experts(recv: jax_ep.Dispatched) -> jax.Array:
                rows = recv.x
                assert isinstance(rows, jax.Array)
                return (jax.nn.silu(rows @ gate) * (rows @ up)) @ down if products else rows

            return jax_ep.moe_with_experts(x, idx, w, experts, group=group)

        inputs = _inputs(mesh, case, *spread)
        if plan is not None:
            _check_slots(group, case, plan, inputs[1], *inputs[6:])

        def program(products: bool, turns: int) -> Callable[[], Any]:
            one = functools.partial(step, products)
            shape = case.topk_idx.shape[1:]
            run = over_ranks(group, lambda *args: chained(one, shape, turns, args)[:1, :1])
            return functools.partial(run, *inputs)

        yield program


def _check_slots(
    group: jax_ep.EpGroup,
    case: CopiesCase,
    plan: jax_ep.ExpertPlacement,
    idx: jax.Array,
    *tables: jax.Array,
) -> None:
    """Raises RuntimeError unless this process's tokens go where the oracle says."""

    def slots(idx: jax.Array, *tables: jax.Array) -> jax.Array:
        return jax_ep.place(idx, jax_ep.PlacementArrays(*tables), group=group)

    want = case.slots(plan)
    for shard in over_ranks(group, slots)(idx, *tables).addressable_shards:
        if not np.array_equal(shard.data, want[shard.index]):
            raise RuntimeError(f"{case.name}: slots are not those of the oracle")


def _inputs(mesh: Mesh, case: CopiesCase, *tables: np.ndarray) -> list[jax.Array]:
    """Each rank's tokens, experts and weights, and one expert's matrices, `[R, ...]`."""
    sharding = NamedSharding(mesh, PartitionSpec("expert"))
    weights = np.random.default_rng(3).uniform(0.05, 1.0, case.topk_idx.shape)

    @functools.partial(jax.jit, static_argnums=(0, 1), out_shardings=sharding)
    def random(number: int, shape: tuple[int, ...]) -> jax.Array:
        values = jax.random.normal(jax.random.key(number), (case.num_ranks, *shape))
        return (values / shape[0] ** 0.5 if number else values).astype(jnp.bfloat16)

    hidden, ffn = case.hidden, case.ffn
    return [
        random(0, (case.num_tokens, hidden)),
        *place(mesh, case.topk_idx, weights.astype(np.float32)),
        *(random(1 + i, s) for i, s in enumerate(((hidden, ffn), (hidden, ffn), (ffn, hidden)))),
        *place(mesh, *tables),
    ]


def summary(case: CopiesCase, values: list[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """A line for each variant.

    Args:
        case: that was measured.
        values: of `measure`, by rank.
    """
    lines = []
    for name, plan in case.variants().items():
        rows = case.rows(plan)
        # Of each sample, the slowest rank.
        seconds = {
            what: np.max([of_rank[f"{name}: {what}"] for of_rank in values], axis=0)
            for what in WHAT
        }
        lines.append(
            {
                "case": case.name,
                "variant": name,
                "rows_of_ranks": rows.tolist(),
                "imbalance": float(rows.max() / rows.mean()),
                "samples": {what: s.tolist() for what, s in seconds.items()},
                **{what: float(np.median(s)) for what, s in seconds.items()},
            }
        )
    return lines


def to_text(lines: list[dict[str, Any]]) -> str:
    """A table: times are medians, of the slowest rank, and ratios are to the first of each case."""
    rows = []
    first: dict[str, Any] = {}
    for line in lines:
        first = line if line["variant"] == WITHOUT else first
        rows.append(
            (
                line["case"],
                line["variant"],
                f"{line['imbalance']:.3f}",
                f"{line['layer'] * 1e6:.0f}",
                f"{first['layer'] / line['layer']:.3f}",
                f"{line['exchange'] * 1e6:.0f}",
                f"{first['exchange'] / line['exchange']:.3f}",
            )
        )
    header = ("case", "slots of a rank", "hottest/mean", "layer us", "x", "exchange us", "x")
    return tabulate(rows, header, disable_numparse=True)
