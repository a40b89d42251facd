# SPDX-License-Identifier: Apache-2.0
"""Options to mesh, EP group and model."""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_ep
from jax_ep.flax.linen import MoE as LinenMoE
from jax_ep.flax.nnx import LayerStats
from jax_ep.flax.nnx import MoE as NnxMoE
from moe_lm.attention import KvCache
from moe_lm.dense import LinenDenseMoE, NnxDenseMoE
from moe_lm.linen_model import LinenFlavor
from moe_lm.nnx_model import NnxFlavor
from moe_lm.options import Options


class Flavor(Protocol):
    """A model as functions of its parameters."""

    def init(self, seed: int) -> Any:
        """The parameters, a pytree."""

    def apply(self, params: Any, tokens: jax.Array) -> tuple[jax.Array, list[LayerStats]]:
        """`[B, S]` bytes to `[B, S, 256]` logits, and the statistics of every layer."""

    def extend(
        self, params: Any, tokens: jax.Array, caches: list[KvCache], start: jax.Array
    ) -> tuple[jax.Array, list[KvCache]]:
        """`[B, S]` bytes that follow `start` others to `[B, S, 256]` logits.

        The caches have what came before, one for each layer, and room for these; they come back
        with them.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run works with.

    Attributes:
        group: the ranks that share the experts.
        model: the model.
        replicated: sharding of what is on every device.
        by_batch: sharding of an array whose first dimension is the batch.
    """

    group: jax_ep.EpGroup
    model: Flavor
    replicated: NamedSharding
    by_batch: NamedSharding


def build(options: Options) -> Setup:
    """Makes everything but the parameters.

    Raises:
        ValueError: there are not enough devices for the mesh, or none of the platform.
        jax_ep.EpUnavailable: the backend that was asked for cannot serve.
    """
    shape = (1, 1) if options.dense else options.mesh
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # without the platform's plugin, JAX asserts
        raise ValueError(f"--platform {options.platform}: JAX finds no devices: {error}") from error
    if len(devices) < options.num_devices:
        raise ValueError(
            f"--mesh {shape[0]}x{shape[1]} needs {options.num_devices} devices, and JAX has "
            f"{len(devices)} ({devices[0].platform}); allowed: a smaller mesh, or XLA_FLAGS="
            f"--xla_force_host_platform_device_count={options.num_devices} with JAX_PLATFORMS=cpu"
        )
    mesh = jax.make_mesh(
        shape,
        ("data", "expert"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[: options.num_devices],
    )
    group = _group(options, mesh)
    moe_options = {"ffn": options.ffn, "num_shared_experts": options.shared_experts}
    if options.flavor == "nnx":
        nnx_moe = NnxDenseMoE if options.dense else NnxMoE
        model = NnxFlavor(options, lambda rngs: nnx_moe(group, rngs=rngs, **moe_options))
    else:
        linen_moe = LinenDenseMoE if options.dense else LinenMoE
        make_moe = functools.partial(linen_moe, group, **moe_options)
        model = LinenFlavor(options, lambda name: make_moe(name=name))
    return Setup(
        group=group,
        model=model,
        replicated=NamedSharding(mesh, PartitionSpec()),
        by_batch=NamedSharding(mesh, PartitionSpec(("data", "expert"))),
    )


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, on the devices of a sharding, which may be of several."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _group(options: Options, mesh: jax.sharding.Mesh) -> jax_ep.EpGroup:
    config = jax_ep.EpConfig(
        num_experts=options.experts,
        num_topk=options.topk,
        hidden=options.hidden,
        max_tokens_per_rank=options.batch * options.seq_len // options.num_devices,
        dtype=jnp.float32,
        wire_dtype=jnp.float8_e4m3fn if options.fp8_wire else None,
        low_latency_tokens=options.low_latency_tokens,
    )
    if options.capacity_factor is not None and not options.dense:
        config = config.with_capacity_factor(options.capacity_factor)
    # A dense run has a group for its sizes only, and exchanges nothing.
    backend = "xla" if options.dense else options.backend
    return jax_ep.EpGroup(mesh, "expert", config, backend=None if backend == "auto" else backend)
