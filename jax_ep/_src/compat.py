# SPDX-License-Identifier: Apache-2.0
"""What differs between the supported versions of JAX (0.10.2 to 0.12), and what is hard to say.

A new release of JAX: CONTRIBUTING.md says in which files it goes. Each entry gives its reason.
Everything here is public API of JAX but `coordination_client` and `coordination_service`.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jaxlib
import numpy as np
from jax._src import distributed
from jax.extend.core import Primitive
from jax.interpreters import partial_eval as pe
from jax.sharding import NamedSharding, PartitionSpec

from jax_ep._src.errors import EpUnavailable


def coordination_client() -> Any:
    """The client of JAX's coordination service: a store of keys, and barriers, over processes.

    None where `jax.distributed.initialize` has not been called. JAX to 0.12 has no public way to
    it; the public `multihost_utils` would need a computation on all processes' devices.
    """
    return distributed.global_state.client


def coordination_service(address: str, num_processes: int, heartbeat_timeout: int) -> Any:
    """JAX's coordination service, run by this process, which need not be one of those it serves.

    Publicly, `jax.distributed.initialize` alone makes one, in process 0, and all die with that
    process. jaxlib has had the function here, with these arguments, from 0.10.2 to 0.12.

    Returns:
        What has a method `shutdown`.

    Raises:
        EpUnavailable: jaxlib has it no more, or with other arguments.
    """
    try:
        make = importlib.import_module("jaxlib._jax").get_distributed_runtime_service
        return make(
            address,
            num_processes,
            heartbeat_timeout=heartbeat_timeout,
            shutdown_timeout=heartbeat_timeout,
            recoverable=True,
        )
    except (ImportError, AttributeError, TypeError) as error:
        raise EpUnavailable(
            f"jaxlib {jaxlib.__version__} has no get_distributed_runtime_service as those of "
            f"0.10.2 to 0.12 have it: {error}"
        ) from error


def survive_others() -> None:
    """This process is to outlive others of its `jax.distributed.initialize`; to be called before.

    Also, SIGTERM is to end it: JAX's preemption service, on by default, catches that. Both are
    JAX's options by their public names, and neither is documented.
    """
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)


def as_array(value: Any) -> Any:
    """The array that a value stands for, such as an `nnx.Param`; other values as they are.

    `jnp` functions take such objects by this method, for which JAX has no public function.
    """
    convert = getattr(value, "__jax_array__", None)
    return value if convert is None else convert()


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """Mesh axes over which any of the arrays varies, by `shard_map`'s typing.

    Empty outside `shard_map`, and under `check_vma=False`, which does not track it. The type of
    an array has had this as `manual_axis_type` since 0.10; before that it was `vma`.
    """
    axes: frozenset[str] = frozenset()
    for array in arrays:
        axes |= frozenset(jax.typeof(array).manual_axis_type.varying)
    return axes


def as_varying(axes: frozenset[str], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, typed as varying over (at least) `axes`. Replaces `lax.pvary`, gone in 0.10."""

    def cast(array: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return tuple(cast(array) for array in arrays)


def varying_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, all typed as varying over the axes over which any of them does."""
    return as_varying(varying_axes(*arrays), *arrays)


def like(aval: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """An abstract array of another shape and dtype that varies over the same axes as `aval`.

    The sharding is replaced with it: one of another number of dimensions is refused.
    """
    spec = PartitionSpec(*([None] * len(shape)))
    return aval.update(
        shape=shape,
        dtype=dtype,
        weak_type=False,
        sharding=NamedSharding(aval.sharding.mesh, spec),
    )


def set_dead_code_rule(
    primitive: Primitive, rule: Callable[[Sequence[bool], Any], tuple[list[bool], Any]]
) -> None:
    """Sets what becomes of a primitive's equation of which not all results are used.

    `rule(used, equation)` says which operands are needed, and the equation instead, or None. JAX
    0.12 also says which operands that are references are alive; ours have none.
    """
    pe.dce_rules[primitive] = lambda used, *others: rule(used, others[-1])
