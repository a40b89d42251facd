# SPDX-License-Identifier: Apache-2.0
"""The things that are compared, as compiled functions of the same arguments."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_ep
from ep_bench.baselines import (
    bucket_all_to_all,
    gather_scatter,
    identity_experts,
    ragged_all_to_all,
)
from ep_bench.cases import DTYPES, NUM_RANKS, Case, GpuCase, Inputs

AXIS = "expert"
# Key on the command line and in the JSON -> name in tables.
VARIANTS = {
    "ours": "jax_ep",
    "xla": "jax_ep, backend xla",
    "gather_scatter": "all-gather + reduce-scatter",
    "all_to_all": "capacity all_to_all",
}
# Not for CPUs, see there.
RAGGED = {"ragged_all_to_all": "lax.ragged_all_to_all"}
# What users write without this library; the faster one is what `ours` is compared with.
BASELINES = ("gather_scatter", "all_to_all")
# Ways to dispatch and combine that are compared on GPUs -> how tables call them.
OURS = {"ours": VARIANTS["ours"], "ours_fp8": "jax_ep, FP8 wire"}
GPU_BASELINES = {key: VARIANTS[key] for key in BASELINES} | {
    "ragged_all_to_all": "ragged_all_to_all",
    "ragged_with_flags": "ragged_all_to_all, with flags",
}
COMPARED = OURS | GPU_BASELINES
# Direction -> whether the gradient is taken too.
DIRECTIONS = {"forward": False, "forward + backward": True}

Exchange = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def make_mesh() -> jax.sharding.Mesh:
    """The 8 ranks.

    Raises:
        RuntimeError: JAX has fewer devices.
    """
    if jax.device_count() < NUM_RANKS:
        raise RuntimeError(f"JAX has {jax.device_count()} devices; {NUM_RANKS} are needed")
    devices = jax.devices()[:NUM_RANKS]
    return jax.make_mesh((NUM_RANKS,), (AXIS,), devices=devices, axis_types=(AxisType.Auto,))


def put(inputs: Inputs, mesh: jax.sharding.Mesh) -> tuple[jax.Array, ...]:
    """The arguments of every variant, on the devices that will use them."""
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    arrays = (inputs.x, inputs.topk_idx, inputs.topk_weights, inputs.out_bar)
    return tuple(jax.block_until_ready(jax.device_put(a, sharding)) for a in arrays)


def ep_config(case: Case, dtype: str) -> jax_ep.EpConfig:
    """The config of `ours` and `xla`: defaults, but for the capacity."""
    return jax_ep.EpConfig(
        num_experts=case.num_experts,
        num_topk=case.num_topk,
        hidden=case.hidden,
        max_tokens_per_rank=case.num_tokens,
        dtype=DTYPES[dtype],
        recv_capacity=case.recv_capacity,
    )


def _there_and_back(
    x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array, *, group: jax_ep.EpGroup
) -> jax.Array:
    recv = jax_ep.dispatch(x, topk_idx, topk_weights, group=group)
    return jax_ep.combine(identity_experts(recv.x), recv.handle, recv.weights, group=group)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One thing that is compared.

    Attributes:
        key: of `VARIANTS` or `RAGGED`.
        backend: of the group; None for baselines.
        exchange: one rank's `(x, topk_idx, topk_weights) -> out`.
        mesh: of the ranks.
    """

    key: str
    backend: str | None
    exchange: Exchange
    mesh: jax.sharding.Mesh

    @property
    def label(self) -> str:
        """Name in tables."""
        return f"jax_ep ({self.backend})" if self.backend else (VARIANTS | RAGGED)[self.key]

    def compile(self, with_gradient: bool) -> Any:
        """A jitted function of `put`'s arrays.

        Returns `out`, or with the gradient `(loss, (x_bar, topk_weights_bar))`; the loss keeps
        the forward pass alive.
        """
        spec = PartitionSpec(AXIS)
        mapped = jax.shard_map(
            self.exchange, mesh=self.mesh, in_specs=(spec, spec, spec), out_specs=spec
        )

        def forward(x: Any, topk_idx: Any, topk_weights: Any, out_bar: Any) -> Any:
            del out_bar
            return mapped(x, topk_idx, topk_weights)

        def with_backward(x: Any, topk_idx: Any, topk_weights: Any, out_bar: Any) -> Any:
            def loss(x: Any, topk_weights: Any) -> jax.Array:
                out = mapped(x, topk_idx, topk_weights)
                return jnp.sum(out.astype(jnp.float32) * out_bar.astype(jnp.float32))

            return jax.value_and_grad(loss, argnums=(0, 1))(x, topk_weights)

        return jax.jit(with_backward if with_gradient else forward)


@contextlib.contextmanager
def open_variant(
    key: str,
    case: Case | GpuCase,
    config: jax_ep.EpConfig,
    mesh: jax.sharding.Mesh,
    backend: str | None = None,
) -> Iterator[Variant]:
    """Makes a variant; its group, if it has one, is closed at the end.

    Args:
        key: of `VARIANTS` or `RAGGED`.
        case: sizes.
        config: of `ours` and `xla`.
        mesh: of the ranks.
        backend: of `ours`; None: the library's choice.
    """
    sizes: dict[str, Any] = {"axis_name": AXIS, "num_experts": case.num_experts}
    if key in ("gather_scatter", "ragged_all_to_all"):
        baseline = gather_scatter if key == "gather_scatter" else ragged_all_to_all
        exchange = functools.partial(baseline, recv_capacity=case.recv_capacity, **sizes)
        yield Variant(key=key, backend=None, exchange=exchange, mesh=mesh)
    elif key == "all_to_all":
        exchange = functools.partial(
            bucket_all_to_all, bucket_capacity=case.bucket_capacity, **sizes
        )
        yield Variant(key=key, backend=None, exchange=exchange, mesh=mesh)
    else:
        chosen = "xla" if key == "xla" else backend
        with jax_ep.EpGroup(mesh, AXIS, config, backend=chosen) as group:
            exchange = functools.partial(_there_and_back, group=group)
            yield Variant(key=key, backend=group.backend, exchange=exchange, mesh=mesh)


def as_numpy(result: Any) -> list[np.ndarray]:
    """`[out]`, or `[x_bar, topk_weights_bar]`, in float64."""
    arrays = result[1] if isinstance(result, tuple) else (result,)
    return [np.asarray(a).astype(np.float64) for a in arrays]
