# SPDX-License-Identifier: Apache-2.0
"""`OpSpec`: the static parameters of one EP operation, as a backend needs them."""

import dataclasses
import re

import numpy as np

from jax_ep._src.groups.group import EpGroup
from jax_ep._src.limits import LAYOUTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpSpec:
    """Hashable, so that it can be a parameter of a primitive and part of a compilation's key.

    Attributes:
        group_id: the group's id in its compiled module; -1 where it has none.
        gpu: whether the `ffi` backend runs it on GPUs.
        axis_names: mesh axes of the group.
        num_ranks: `R`.
        num_experts: `R * L`: `E`, and those that pad it to a multiple of `R`.
        num_topk: `K`.
        expert_alignment: rows.
        layout: "expert" or "rank".
        recv_capacity: `C`.
        zero_fill: whether `dispatch` zeroes rows that hold no token.
        dtype: of rows.
        fp8_wire: whether rows of `dispatch` travel as float8_e4m3fn.
        fp8_rows: whether they are received as such, with their scales.
        domain_size: `D`, consecutive ranks whose sum is rounded before the sums of the next are
            added.
        on_timeout: "error", or "mask": operations go on without ranks that do not come, and say
            which these are.
    """

    group_id: int
    gpu: bool
    axis_names: tuple[str, ...]
    num_ranks: int
    num_experts: int
    num_topk: int
    expert_alignment: int
    layout: str
    recv_capacity: int
    zero_fill: bool
    dtype: np.dtype
    fp8_wire: bool
    fp8_rows: bool
    domain_size: int
    on_timeout: str

    @classmethod
    def of(cls, group: EpGroup, *, num_tokens: int) -> "OpSpec":
        """The parameters of a group's forward operations in a call with so many tokens a rank."""
        config = group.config
        return cls(
            group_id=group.group_id,
            gpu=group.backend == "ffi" and group.platform == "cuda",
            axis_names=group.axis_names,
            num_ranks=group.num_ranks,
            num_experts=group.num_ranks * group.num_local_experts,
            num_topk=config.num_topk,
            expert_alignment=config.expert_alignment,
            layout=config.layout,
            recv_capacity=config.capacity(num_ranks=group.num_ranks, num_tokens=num_tokens),
            zero_fill=config.zero_fill,
            dtype=config.dtype,
            fp8_wire=config.wire_dtype is not None,
            fp8_rows=config.recv_dtype is not None,
            domain_size=group.domain_size,
            on_timeout=group.on_timeout if group.backend == "ffi" else "error",
        )

    def for_cotangents(self) -> "OpSpec":
        """The same exchange of a gradient: in its own dtype, and with zeros in empty rows."""
        return dataclasses.replace(self, zero_fill=True, fp8_wire=False, fp8_rows=False)

    @property
    def num_local_experts(self) -> int:
        """`L`."""
        return self.num_experts // self.num_ranks

    @property
    def num_row_groups(self) -> int:
        """Length of `group_sizes`."""
        return self.num_local_experts if self.layout == "expert" else self.num_ranks

    @property
    def row_scalars_shape(self) -> tuple[int, ...]:
        """Shape of what the weights of received rows have."""
        if self.layout == "expert":
            return (self.recv_capacity,)
        return (self.recv_capacity, self.num_topk)

    @property
    def row_topk_shape(self) -> tuple[int, ...] | None:
        """Shape of the local experts of received rows; None in layout "expert"."""
        return None if self.layout == "expert" else (self.recv_capacity, self.num_topk)

    def source_slot_shape(self, num_tokens: int) -> tuple[int, ...] | None:
        """Shape of the rows that a rank holds of each token of each rank; None but on GPUs."""
        if not self.gpu:
            return None
        rows_per_token = (
            min(self.num_topk, self.num_local_experts) if self.layout == "expert" else 1
        )
        return (self.num_ranks * num_tokens, rows_per_token)

    def ffi_attributes(self) -> dict[str, np.generic]:
        """The attribute "ep" of every FFI target, as `xla_ffi/op_arguments.h` decodes it."""
        return {
            "group_id": np.int64(self.group_id),
            "num_ranks": np.int32(self.num_ranks),
            "num_experts": np.int32(self.num_experts),
            "num_topk": np.int32(self.num_topk),
            "expert_alignment": np.int32(self.expert_alignment),
            "layout": np.int32(LAYOUTS.index(self.layout)),
        }


def scope_name(operation: str, group: EpGroup) -> str:
    """What profiles and HLO call an operation of a group: `jax_ep.dispatch/EpGroup_0`."""
    number = group.name.split()[1]
    return f"jax_ep.{operation}/EpGroup_{number}"


def without_group(scopes: str) -> str:
    """A stack of names without what `scope_name` says of the group."""
    return re.sub(r"/EpGroup_\d+", "", scopes)
