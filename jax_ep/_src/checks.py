# SPDX-License-Identifier: Apache-2.0
"""Checks of what users pass; every message says what came and what is allowed."""

import math
import warnings
from typing import Any

import jax
import numpy as np

from jax_ep._src.groups.group import EpGroup


def is_array(value: Any) -> bool:
    """Whether a value is an array, in a trace or not."""
    return isinstance(value, (jax.Array, np.ndarray))


def check_array(
    name: str, value: Any, shape: tuple[int | str, ...], dtype: np.dtype, *, of: str = ""
) -> None:
    """Raises unless a value is an array of this dtype and shape.

    Args:
        name: of the argument.
        value: what came.
        shape: a letter stands for any size.
        dtype: the allowed one.
        of: where the sizes come from, for the message.

    Raises:
        ValueError: it is not.
    """
    allowed = f"{dtype.name}[{', '.join(str(size) for size in shape)}]{of}"
    if not is_array(value):
        raise ValueError(f"{name} is a {type(value).__name__}; allowed: an array, {allowed}")
    fits = len(value.shape) == len(shape) and all(
        isinstance(size, str) or got == size for got, size in zip(value.shape, shape, strict=True)
    )
    if not fits or value.dtype != dtype:
        raise ValueError(f"{name} is {value.dtype}{list(value.shape)}; allowed: {allowed}")


def check_group(group: Any, *, expert_layout_for: str | None = None) -> None:
    """Raises unless a value is a group, whether open or closed.

    Args:
        group: what came.
        expert_layout_for: the name of what needs layout "expert"; None: both layouts will do.

    Raises:
        ValueError: it is none, or has another layout.
    """
    if not isinstance(group, EpGroup):
        raise ValueError(f"group is a {type(group).__name__}; allowed: an EpGroup")
    if expert_layout_for is not None and group.config.layout != "expert":
        raise ValueError(
            f"group has EpConfig.layout {group.config.layout!r}; allowed for {expert_layout_for}: "
            "'expert', because ragged_dot needs the rows of each expert next to each other"
        )


def check_call(operation: str, group: Any) -> None:
    """Raises unless an operation may be called: in `shard_map` over the axes of an open group.

    Raises:
        ValueError: `group` is none, or the call is not in `shard_map` over its axes.
        EpGroupClosed: the group has been closed.

    Warns:
        UserWarning: `shard_map` leaves axes of the mesh to the compiler, which cannot split the
            call over them.
    """
    check_group(group)
    group.check_open()
    mesh = jax.sharding.get_abstract_mesh()
    missing = [name for name in group.axis_names if name not in mesh.manual_axes]
    if missing:
        raise ValueError(
            f"{operation} must be called inside jax.shard_map over the group's axes "
            f"{group.axis_names}; not manual here: {missing}"
        )
    for name in group.axis_names:
        if mesh.shape[name] != group.mesh.shape[name]:
            raise ValueError(
                f"{operation}: axis {name!r} has {mesh.shape[name]} devices here, and "
                f"{group.mesh.shape[name]} in the mesh of the group"
            )
    left = [name for name in mesh.axis_names if name not in mesh.manual_axes]
    is_repeated = math.prod(mesh.shape[name] for name in left) > 1
    if is_repeated and operation.startswith("dispatch"):  # once for each exchange
        warnings.warn(
            f"{operation} is called in a jax.shard_map that leaves the axes {left} to the "
            "compiler, which cannot split the call: along them every device gets all of the tokens "
            "and repeats the work. Name them in shard_map's axis_names, and in its in_specs, to "
            "split the tokens over them",
            stacklevel=4,  # whoever calls `dispatch`
        )
