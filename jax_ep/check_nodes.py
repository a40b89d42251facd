# SPDX-License-Identifier: Apache-2.0
"""Checks and measures expert parallelism over all GPUs of a cluster; see docs/guide/multi_node.md.

    srun --ntasks-per-node=8 --gpus-per-node=8 python -m jax_ep.check_nodes
    python -m jax_ep.check_nodes --coordinator HOST:PORT --processes N --process I --device D

One process for each GPU. It compares dispatch, combine and gradients with the oracle to the bit,
runs turns with other routing each, measures, and writes one JSON file. Without several processes it
is a dry run on the devices that there are.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jax_ep
from jax_ep import reference
from jax_ep._src import compat, info, version
from jax_ep._src.groups.cuda import host

_AXES = ("host", "device")
_TIMEOUT_S = 60.0  # of groups; a rank that gives up costs its process
_GATHER_MS = 10 * int(_TIMEOUT_S) * 1000
_WARM_UP, _RUNS = 3, 20
_FP8 = "float8_e4m3fn"


class Case(NamedTuple):
    """A problem that is compared with the oracle; sizes are per rank."""

    name: str
    num_tokens: int
    hidden: int
    dtype: str = "bfloat16"
    layout: str = "expert"
    wire_dtype: str | None = None
    recv_capacity: int | None = None


CASES = [
    Case("float32", 9, 33, dtype="float32"),
    Case("bfloat16", 17, 64),
    Case("float16, by rank", 17, 40, dtype="float16", layout="rank"),
    Case("FP8 wire", 9, 144, wire_dtype=_FP8),
    Case("FP8 wire, by rank", 9, 256, wire_dtype=_FP8, layout="rank"),
    Case("rows that are dropped", 33, 24, recv_capacity=40),
    Case("long rows", 5, 7168),
    Case("one token", 1, 16),
    Case("no token", 0, 16),
]


class Processes:
    """The processes of the run, which tell each other through JAX's coordination service."""

    def __init__(self) -> None:
        """Sends nothing yet."""
        self.count: int = jax.process_count()
        self.index: int = jax.process_index()
        self._client: Any = compat.coordination_client() if self.count > 1 else None

    def gather(self, what: str, value: Any) -> list[Any]:
        """The values of all processes, which are JSON, by index."""
        if self._client is None:
            return [value]
        prefix = f"jax_ep/check_nodes/{what}"
        self._client.key_value_set(f"{prefix}/{self.index}", json.dumps(value))
        return [
            json.loads(self._client.blocking_key_value_get(f"{prefix}/{i}", _GATHER_MS))
            for i in range(self.count)
        ]


def make_mesh(hosts: Sequence[str]) -> Mesh:
    """All devices; ranks of a host follow each other. `hosts` are those of the processes."""
    by_host: dict[str, list[jax.Device]] = {}
    for device in sorted(jax.devices(), key=lambda d: (d.process_index, d.id)):
        by_host.setdefault(hosts[device.process_index], []).append(device)
    counts = {host: len(devices) for host, devices in by_host.items()}
    if len(set(counts.values())) != 1:
        raise SystemExit(f"check_nodes: the hosts have unequal numbers of devices: {counts}")
    return Mesh(np.array(list(by_host.values())), _AXES)


def _over_ranks(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    spec = PartitionSpec(_AXES)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec))


def _place(mesh: Mesh, *arrays: np.ndarray) -> list[jax.Array]:
    """Arrays `[R, ...]` of all ranks, a part on each: `[R * n, ...]` of `[R, n, ...]`."""
    sharding = NamedSharding(mesh, PartitionSpec(_AXES))
    flat = [array.reshape(-1, *array.shape[2:]) for array in arrays]
    return [jax.make_array_from_callback(a.shape, sharding, lambda i, a=a: a[i]) for a in flat]


def _draw(case: Case, num_ranks: int, num_experts: int, num_topk: int) -> tuple[np.ndarray, ...]:
    """x, topk_idx and topk_weights of all ranks; some selections are masked."""
    rng = np.random.default_rng(1)
    shape = (num_ranks, case.num_tokens)
    order = np.argsort(rng.random((*shape, num_experts)), axis=-1)
    idx = order[..., :num_topk].astype(np.int32)
    idx[rng.random(idx.shape) < 0.1] = -1
    x = rng.standard_normal((*shape, case.hidden)).astype(np.float32)
    w = rng.uniform(0.05, 1.0, idx.shape).astype(np.float32)
    return x.astype(jnp.dtype(case.dtype)), idx, w


def _timeout() -> float | None:
    return _TIMEOUT_S if jax.process_count() > 1 else None


def _differences(got: jax.Array, want: np.ndarray, num_ranks: int) -> list[int]:
    """Ranks of this process whose part is not to the bit what it is to be."""
    each = want.reshape(num_ranks, -1, *want.shape[2:])
    wrong = []
    for shard in got.addressable_shards:
        first = shard.index[0].start or 0
        rank = first // max(each.shape[1], 1) if each.shape[1] else 0
        mine = np.asarray(shard.data)
        if each.shape[1] and mine.tobytes() != np.ascontiguousarray(each[rank]).tobytes():
            wrong.append(rank)
    return wrong


def check_case(mesh: Mesh, case: Case, domain_size: int | None) -> str | None:
    """What is wrong on this process's ranks; None if all is to the bit as the oracle has it."""
    num_ranks = mesh.size
    num_experts, num_topk = 4 * num_ranks, min(4, 4 * num_ranks)
    sizes: dict[str, Any] = {
        "num_experts": num_experts,
        "layout": case.layout,
        "recv_capacity": case.recv_capacity,
        "dtype": jnp.dtype(case.dtype),
        "wire_dtype": case.wire_dtype and jnp.dtype(case.wire_dtype),
    }
    config = jax_ep.EpConfig(
        **sizes, num_topk=num_topk, hidden=case.hidden, domain_size=domain_size,
        max_tokens_per_rank=max(case.num_tokens, 1),
    )  # fmt: skip
    x, idx, w = _draw(case, num_ranks, num_experts, num_topk)
    with jax_ep.EpGroup(mesh, _AXES, config, backend="ffi", timeout=_timeout()) as group:

        def on_rank(x: jax.Array, idx: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
            def layer(x: jax.Array) -> tuple[jax.Array, jax.Array]:
                received = jax_ep.dispatch(x, idx, w, group=group)
                rows: Any = received.x  # not quantized: the config does not ask for that
                return jax_ep.combine(rows, received.handle, received.weights, group=group), rows

            out, vjp, rows = jax.vjp(layer, x, has_aux=True)
            return rows, out, vjp(out)[0]

        rows, out, x_bar = jax.block_until_ready(
            _over_ranks(mesh, on_rank)(*_place(mesh, x, idx, w))
        )
        sums = {"dtype": sizes["dtype"], "domain_size": group.domain_size}
    want = reference.dispatch(x, idx, w, **sizes)
    sent = reference.combine(want.x, want.plan, want.weights, **sums)
    y_bar, _ = reference.combine_vjp(want.x, want.plan, want.weights, sent, dtype=sizes["dtype"])
    wanted: dict[str, tuple[jax.Array, Any]] = {
        "rows": (rows, want.x),
        "sums": (out, sent),
        "gradients": (x_bar, reference.combine(y_bar, want.plan, **sums)),
    }
    wrong = {
        what: ranks for what, pair in wanted.items() if (ranks := _differences(*pair, num_ranks))
    }
    return None if not wrong else f"not to the bit as the oracle has them, by rank: {wrong}"


def run_turns(mesh: Mesh, num_turns: int, domain_size: int | None) -> int:
    """Exchanges with other routing each, one after the other; how many elements were wrong."""
    num_ranks, num_tokens, num_topk, hidden = mesh.size, 32, 4, 64
    num_experts = 4 * num_ranks
    config = jax_ep.EpConfig(
        num_experts=num_experts, num_topk=num_topk, hidden=hidden, dtype="float32",
        max_tokens_per_rank=num_tokens, domain_size=domain_size,
    )  # fmt: skip
    with jax_ep.EpGroup(mesh, _AXES, config, backend="ffi", timeout=_timeout()) as group:

        def on_rank(x: jax.Array) -> jax.Array:
            token = jnp.arange(num_tokens, dtype=jnp.int32)[:, None]
            k = jnp.arange(num_topk, dtype=jnp.int32)[None, :]

            def turn(number: jax.Array, wrong: jax.Array) -> jax.Array:
                # Distinct experts: a step that has no factor in common with their number.
                first = (token * 7 + number * 13 + x[:, :1].astype(jnp.int32)) % num_experts
                idx = (first + k * (num_experts // num_topk)) % num_experts
                idx = jnp.where((token + number + k) % 5 == 0, -1, idx)
                received = jax_ep.dispatch(x, idx, group=group)
                rows: Any = received.x
                out = jax_ep.combine(rows, received.handle, group=group)
                kept = jnp.sum(idx >= 0, axis=1, keepdims=True).astype(x.dtype)
                return wrong + jnp.sum(out != kept * x, dtype=jnp.int32)

            zero = jnp.sum(x, dtype=jnp.int32)[None] * 0
            return jax.lax.fori_loop(0, num_turns, lambda i, n: turn(i, n), zero)

        numbers = np.arange(num_ranks * num_tokens * hidden) % 251
        x = numbers.reshape(num_ranks, num_tokens, hidden).astype(np.float32)
        wrong = jax.block_until_ready(_over_ranks(mesh, on_rank)(*_place(mesh, x)))
        return sum(int(np.asarray(shard.data).sum()) for shard in wrong.addressable_shards)


def measure(mesh: Mesh, num_tokens: int, hidden: int, domain_size: int | None) -> dict[str, Any]:
    """Microseconds of dispatch and combine, the median of this process, and bytes of a rank."""
    num_ranks, num_topk = mesh.size, 8
    num_experts = 8 * num_ranks
    config = jax_ep.EpConfig(
        num_experts=num_experts, num_topk=num_topk, hidden=hidden, dtype="bfloat16",
        max_tokens_per_rank=num_tokens, domain_size=domain_size,
    )  # fmt: skip
    case = Case("", num_tokens, hidden)
    x, idx, _ = _draw(case, num_ranks, num_experts, num_topk)
    with jax_ep.EpGroup(mesh, _AXES, config, backend="ffi", timeout=_timeout()) as group:

        def send(x: jax.Array, idx: jax.Array) -> Any:
            received = jax_ep.dispatch(x, idx, group=group)
            # What a rank has of the handle is one number, in places.
            return jax.tree.map(lambda part: part[None], (received.x, received.handle))

        def bring_back(y: jax.Array, handle: jax_ep.DispatchHandle) -> jax.Array:
            y, handle = jax.tree.map(lambda part: part[0], (y, handle))
            return jax_ep.combine(y, handle, group=group)

        dispatch, combine = _over_ranks(mesh, send), _over_ranks(mesh, bring_back)
        placed = _place(mesh, x, idx)
        received = jax.block_until_ready(dispatch(*placed))
        times = {
            "dispatch": _median_us(lambda: dispatch(*placed)),
            "combine": _median_us(lambda: combine(*received)),
        }
    ranks_of_host = mesh.shape["device"]
    hosts = np.where(idx >= 0, idx // (num_experts // num_ranks) // ranks_of_host, -1)
    own = np.arange(num_ranks)[:, None] // ranks_of_host
    remote = [np.any(hosts == host, axis=-1) & (own != host) for host in range(mesh.shape["host"])]
    crossing = float(np.sum(remote)) / num_ranks
    return {
        "tokens": num_tokens, "hidden": hidden, "dtype": "bfloat16", "topk": num_topk,
        "experts": num_experts, "microseconds": times,
        "network_bytes_of_a_rank": crossing * hidden * 2,
    }  # fmt: skip


def _median_us(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(_WARM_UP + _RUNS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[_WARM_UP:])


def _slowest(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all processes have measured: everybody waits for the slowest."""
    times = {
        name: max(one["microseconds"][name] for one in measured)
        for name in measured[0]["microseconds"]
    }
    crossing = measured[0]["network_bytes_of_a_rank"]
    rates = {name: crossing / us / 1e3 for name, us in times.items()}
    return {**measured[0], "microseconds": times, "network_GB_per_s_of_a_rank": rates}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_ep.check_nodes", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process", type=int, help="which one this is, from 0")
    parser.add_argument("--device", type=int, help="ordinal of its GPU on the host")
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 1024, 4096])
    parser.add_argument("--hidden", type=int, default=7168, help="of what is measured")
    parser.add_argument("--turns", type=int, default=1000)
    parser.add_argument("--domain-size", type=int, help="of a dry run")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("check_nodes.json"))
    args = parser.parse_args(argv)
    given = [args.coordinator, args.processes, args.process]
    if any(v is not None for v in given) and any(v is None for v in given):
        parser.error("--coordinator, --processes and --process go together")
    return args


def _join(args: argparse.Namespace) -> None:
    """Meets the other processes, if there are any: by hand, or as a launcher has started them."""
    if args.coordinator is not None:
        devices = None if args.device is None else [args.device]
        jax.distributed.initialize(
            args.coordinator, args.processes, args.process, local_device_ids=devices
        )
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        jax.distributed.initialize()


def main(argv: list[str] | None = None) -> int:
    """Runs it all; the exit status is 1 if something was wrong in any process."""
    args = parse_args(argv)
    _join(args)
    processes = Processes()
    mine = {"host": host(), "name": platform.node(), "info": info.report()}
    about = processes.gather("about", mine)
    mesh = make_mesh([one["host"] for one in about])
    report: dict[str, Any] = {
        "jax_ep": version.full_version(),
        "jax": jax.__version__,
        "mesh": dict(mesh.shape),
        "processes": about,
        "checks": {},
        "measured": [],
    }
    say = print if processes.index == 0 else lambda *_: None
    say(mine["info"])
    say(f"\n{mesh.shape['host']} host(s) with {mesh.shape['device']} device(s) each")
    if mesh.shape["host"] == 1:
        say("DRY RUN: one host, so nothing crosses a network")

    def check(name: str, run: Callable[[], str | None]) -> None:
        try:
            wrong = run()
        except Exception as e:  # noqa: BLE001 - the report has it, and the others go on
            wrong = f"{type(e).__name__}: {e}"
        found = {i: what for i, what in enumerate(processes.gather(name, wrong)) if what}
        report["checks"][name] = found or "right"
        say(f"  {name}: {found or 'right'}")

    for case in CASES:
        check(case.name, lambda case=case: check_case(mesh, case, args.domain_size))
    turns = f"{args.turns} turns"
    check(turns, lambda: _wrong_elements(run_turns(mesh, args.turns, args.domain_size)))
    failed = any(found != "right" for found in report["checks"].values())
    if not failed:
        for tokens in dict.fromkeys(args.tokens):
            found: list[dict[str, Any]] = []
            name = f"measured at {tokens} tokens"
            check(name, _measuring(found, mesh, tokens, args))
            if failed := report["checks"][name] != "right":  # in any process: all stop
                break
            report["measured"].append(_slowest(processes.gather(f"{tokens} tokens", found[0])))
            say(f"  T {tokens}: {report['measured'][-1]}")
    if processes.index == 0:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        say(f"wrote {args.out}; please attach it if you open an issue")
    return 1 if failed else 0


def _measuring(
    found: list[dict[str, Any]], mesh: Mesh, tokens: int, args: argparse.Namespace
) -> Callable[[], None]:
    """What measures, and puts what it has measured into a list."""
    return lambda: found.append(measure(mesh, tokens, args.hidden, args.domain_size))


def _wrong_elements(count: int) -> str | None:
    return f"{count} elements were wrong" if count else None


if __name__ == "__main__":
    sys.exit(main())
