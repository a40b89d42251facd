# SPDX-License-Identifier: Apache-2.0
"""`EpConfig`: everything about an EP group's sizes and formats that is known before any data is.

Imports no JAX, so that sizes can be worked out anywhere.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from jax_ep._src import limits
from jax_ep._src.public import set_module

if TYPE_CHECKING:

    class DType:
        """Of fields that are made from whatever NumPy takes for a dtype, and are an `np.dtype`.

        For checkers a descriptor, whose `__set__` says what the constructor takes.
        """

        def __get__(self, config: Any, of: Any = None) -> np.dtype: ...
        def __set__(self, config: Any, value: DTypeLike) -> None: ...

    class OptionalDType:
        """The same, or None."""

        def __get__(self, config: Any, of: Any = None) -> np.dtype | None: ...
        def __set__(self, config: Any, value: DTypeLike | None) -> None: ...
else:
    DType, OptionalDType = DTypeLike, DTypeLike | None

_Class = TypeVar("_Class", bound=type)
# Fields that may be None, or an int.
_OPTIONAL_INTS = (
    *("recv_capacity", "max_num_sms", "tail_num_sms", "low_latency_tokens"),
    "domain_size",
)
_MAY_BE_0 = ("tail_num_sms", "low_latency_tokens")


def _refuse_old_names(**new_names: str) -> Callable[[_Class], _Class]:
    """Makes a class whose arguments were renamed say so: old name = new name."""

    def decorate(cls: _Class) -> _Class:
        init: Any = cls.__init__

        @functools.wraps(init)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            for old in new_names.keys() & kwargs.keys():
                raise TypeError(
                    f"{cls.__name__} has no {old!r} any more; allowed: {new_names[old]!r}, its "
                    "new name"
                )
            init(self, *args, **kwargs)

        setattr(cls, "__init__", checked)  # noqa: B010  which type checkers refuse as `=`
        return cls

    return decorate


@set_module("jax_ep")
@_refuse_old_names(num_sms="max_num_sms")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EpConfig:
    """Sizes and formats of one EP group. Frozen, hashable, checked when it is made.

    Attributes:
        num_experts: `E`, experts of the layer, over all ranks; the group's number of ranks must
            divide it, but for `pad_experts`.
        num_topk: `K`, selections per token, at most `num_experts`.
        hidden: `H`, elements of a token row.
        max_tokens_per_rank: the most tokens that one rank may pass to one `dispatch`.
        dtype: of token rows: float32, bfloat16 or float16.
        wire_dtype: None (rows travel in `dtype`), or float8_e4m3fn: `dispatch` sends rows in
            FP8 with one float32 scale per 128 elements. Combine and gradients travel in `dtype`.
        recv_dtype: None (rows are received in `dtype`), or float8_e4m3fn, with the same
            `wire_dtype`: rows are received as they travel, as `QuantizedRows`, a byte for each
            element.
        layout: "expert" (one row per selection, grouped by local expert) or "rank" (one row per
            token and destination rank).
        recv_capacity: `C`, rows of a rank's receive buffer, whatever the `T` of a call is. None:
            it follows `T`, see `capacity`.
        capacity_factor: rows per row of perfectly even routing, from which `C` is derived for the
            `T` of a call. None: the worst case of a call's tokens, so that nothing can be dropped.
            Not together with `recv_capacity`.
        expert_alignment: rows; every expert starts at a multiple of it. Layout "expert" only.
        zero_fill: whether received rows that hold no token are zeros. False leaves them
            unspecified, which saves the time to write them.
        max_num_sms: SMs that each of the GPU kernels that wait for a peer may take at most. None:
            chosen from the sizes. Without effect on the numbers, and on other devices.
        tail_num_sms: SMs beyond these that the end of a large dispatch may take at most, when all
            has been sent and no peer is waited for any more. None: all that idle; 0: none, for
            programs that keep those SMs busy with something else. Without effect on the numbers,
            and on other devices.
        low_latency_tokens: GPU kernels for few tokens, as when a model generates text, serve calls
            of at most so many tokens on each rank, for which the group's heaps get more room. At
            most 256, at most `max_tokens_per_rank`, and at most 16,384 selections of all ranks of
            the group. 0: none. None: chosen; that is none as yet, since more than two
            GPUs have not been measured. Without effect on the numbers, and on other devices.
        domain_size: `D`, ranks of a domain: `combine` rounds the sum over each `D` consecutive
            ranks to `dtype` before it adds the sums of the domains, as it has to be where domains
            are joined by a network. Must divide the number of ranks. None: all ranks are one. It
            says what the numbers are, wherever the ranks run: set it to have the bits of another
            arrangement. None, 1 and the number of ranks give the same ones.
        drop: which rows are dropped where they do not fit into `C`. "rows": those past `C`, so
            that it is always the last experts of a rank that lose. "even": every local expert
            first gets its share, see below. Layout "expert" only. Without any drop both give the
            same bits.
        pad_experts: whether `E` need not be a multiple of the number of ranks `R`. If True, a
            rank has `L = ceil(E / R)` experts, and `R * L - E` experts that nobody can select come
            last. What has an entry or a matrix for each expert then has `R * L` of them.

    With `drop` "even" each local expert keeps the first ones of its rows, in the order (source
    rank, source token), and the rows that are kept are laid out as with "rows": each group starts
    at a multiple of `expert_alignment`, and padding past row `C` is cut off. Numbers of rows fit
    if then no row that holds a token is past `C`. How many of its rows an expert keeps is worked
    out in two steps:

    1. Each local expert keeps `min(its rows, fair)`, where `fair` is `floor(C / L)` rounded down
       to a multiple of `expert_alignment`. They fit.
    2. Expert by expert, ascending, that number is raised to the largest one up to all of its rows
       with which they still fit.

    Where `C` holds less than `expert_alignment` rows for each expert, `fair` is 0, and "even" is
    "rows". Its price, in calls whose `C` is below the worst case: one all-gather of `R * L` int32
    from each rank before the exchange, so that `dispatch_start`, too, waits for the other ranks.

    Raises:
        ValueError: a field has a value that is not allowed; the message names the field, the
            value and what is allowed.
        TypeError: a name is not one of a field; of a field that has been renamed the message
            gives the new name.
    """

    num_experts: int
    num_topk: int
    hidden: int
    max_tokens_per_rank: int
    dtype: DType = ml_dtypes.bfloat16  # type: ignore[assignment]
    wire_dtype: OptionalDType = None  # type: ignore[assignment]
    recv_dtype: OptionalDType = None  # type: ignore[assignment]
    layout: Literal["expert", "rank"] = "expert"
    recv_capacity: int | None = None
    capacity_factor: float | None = None
    expert_alignment: int = 1
    zero_fill: bool = True
    max_num_sms: int | None = None
    tail_num_sms: int | None = None
    low_latency_tokens: int | None = None
    domain_size: int | None = None
    drop: Literal["rows", "even"] = "rows"
    pad_experts: bool = False

    def __post_init__(self) -> None:
        for field in ("num_experts", "num_topk", "hidden", "max_tokens_per_rank"):
            self._check_positive_int(field)
        if self.num_topk > self.num_experts:
            raise ValueError(
                f"EpConfig.num_topk is {self.num_topk}; it must be at most num_experts "
                f"({self.num_experts}), because a token's experts are distinct"
            )
        object.__setattr__(self, "dtype", self._known_dtype("dtype", self.dtype, limits.DTYPES))
        for field in ("wire_dtype", "recv_dtype"):
            if getattr(self, field) is not None:
                fp8 = self._known_dtype(field, getattr(self, field), limits.WIRE_DTYPES, "None")
                object.__setattr__(self, field, fp8)
        if self.recv_dtype is not None and self.wire_dtype is None:
            raise ValueError(
                f"EpConfig.recv_dtype is {self.recv_dtype.name!r} and wire_dtype None; allowed: "
                "recv_dtype None, or float8_e4m3fn for both, because rows are received as they "
                "travel"
            )
        if self.layout not in limits.LAYOUTS:
            raise ValueError(f"EpConfig.layout is {self.layout!r}; allowed: 'expert', 'rank'")
        for field in _OPTIONAL_INTS:
            if getattr(self, field) is not None:
                self._check_int(field, least=0 if field in _MAY_BE_0 else 1)
        self._check_low_latency_tokens()
        self._check_capacity_factor()
        self._check_positive_int("expert_alignment")
        if self.layout == "rank" and self.expert_alignment != 1:
            raise ValueError(
                f"EpConfig.expert_alignment is {self.expert_alignment}; layout 'rank' has no "
                "groups of experts to align, so it must be 1 there"
            )
        self._check_drop()
        for field in ("zero_fill", "pad_experts"):
            value = getattr(self, field)
            if not isinstance(value, (bool, np.bool_)):
                raise ValueError(f"EpConfig.{field} is {value!r}; allowed: True, False")
            object.__setattr__(self, field, bool(value))

    def _check_positive_int(self, field: str) -> None:
        self._check_int(field, least=1)

    def _check_int(self, field: str, least: int) -> None:
        value = getattr(self, field)
        if not limits.is_int(value, least):
            none = "None or " if field in _OPTIONAL_INTS else ""
            raise ValueError(
                f"EpConfig.{field} is {value!r}; allowed: {none}an int from {least} to "
                f"{limits.INT32_MAX}"
            )
        object.__setattr__(self, field, int(value))

    def _check_drop(self) -> None:
        if not isinstance(self.drop, str) or self.drop not in ("rows", "even"):
            raise ValueError(f"EpConfig.drop is {self.drop!r}; allowed: 'rows', 'even'")
        if self.drop == "even" and self.layout != "expert":
            raise ValueError(
                f"EpConfig.drop is 'even' and layout {self.layout!r}; allowed: drop 'rows', or "
                "layout 'expert', whose rows belong to one expert each"
            )

    def _check_low_latency_tokens(self) -> None:
        most = min(limits.MAX_LOW_LATENCY_TOKENS, self.max_tokens_per_rank)
        if self.low_latency_tokens is not None and self.low_latency_tokens > most:
            raise ValueError(
                f"EpConfig.low_latency_tokens is {self.low_latency_tokens}; allowed: None or an "
                f"int from 0 to {most}"
            )

    def _check_capacity_factor(self) -> None:
        factor = self.capacity_factor
        if factor is None:
            return
        is_number = isinstance(factor, numbers.Real) and not isinstance(factor, (bool, np.bool_))
        if not is_number or not 0 < float(factor) < math.inf:
            raise ValueError(
                f"EpConfig.capacity_factor is {factor!r}; allowed: None, or a finite number above 0"
            )
        object.__setattr__(self, "capacity_factor", float(factor))
        if self.recv_capacity is not None:
            raise ValueError(
                f"EpConfig.recv_capacity is {self.recv_capacity} and capacity_factor {factor!r}; "
                "allowed: one of them, because each says how many rows there are"
            )

    @staticmethod
    def _known_dtype(
        field: str, value: Any, known: dict[str, np.dtype], also: str | None = None
    ) -> np.dtype:
        allowed = ", ".join(([also] if also else []) + list(known))
        try:
            dtype = np.dtype(value)
        except TypeError:
            dtype = None
        if dtype is None or dtype.name not in known:
            got = value if dtype is None else dtype.name
            raise ValueError(f"EpConfig.{field} is {got!r}; allowed: {allowed}")
        return known[dtype.name]

    def with_capacity_factor(self, factor: float) -> "EpConfig":
        """Returns this config with room for `factor` times the rows of perfectly even routing.

        Sets `capacity_factor`, and no `recv_capacity`: see `capacity`.

        Args:
            factor: rows per row of even routing; above 0. 1.0 holds what a rank receives when
                all experts are equally popular.

        Raises:
            ValueError: a bad factor.
        """
        return dataclasses.replace(self, recv_capacity=None, capacity_factor=factor)

    def capacity(self, *, num_ranks: int, num_tokens: int) -> int:
        """`C`: rows of a rank's receive buffer in a call with `num_tokens` tokens on each rank.

        `recv_capacity` where it is set. With a `capacity_factor` `f`: `ceil(f * (T * K))`, in
        float64, plus what the alignment can need, which is up to `expert_alignment - 1` rows for
        each local expert. With neither: the rows into which every routing of `T` tokens fits.

        Args:
            num_ranks: ranks of the group; must divide `num_experts`, but for `pad_experts`.
            num_tokens: `T`, from 0 to `max_tokens_per_rank`.

        Raises:
            ValueError: a bad number of ranks or tokens.
        """
        num_local_experts = self.num_local_experts(num_ranks=num_ranks)
        if not limits.is_int(num_tokens, 0) or num_tokens > self.max_tokens_per_rank:
            raise ValueError(
                f"num_tokens is {num_tokens!r}; allowed: an int from 0 to max_tokens_per_rank, "
                f"which is {self.max_tokens_per_rank}"
            )
        if self.recv_capacity is not None:
            return self.recv_capacity
        align = self.expert_alignment
        if self.capacity_factor is not None:
            rows = math.ceil(self.capacity_factor * (num_tokens * self.num_topk))
            return -(-_padded_rows(rows, num_local_experts, align) // align) * align
        rows = num_ranks * num_tokens
        if self.layout == "expert":
            rows *= min(self.num_topk, num_local_experts)
        # Every group is a multiple of the alignment, so their sum is one too.
        return _padded_rows(rows, num_local_experts, align) // align * align

    def num_local_experts(self, *, num_ranks: int) -> int:
        """`L`: experts of each rank of a group of `num_ranks` ranks.

        Args:
            num_ranks: ranks of the group; must divide `num_experts`, but for `pad_experts`.

        Raises:
            ValueError: a bad number of ranks.
        """
        if not limits.is_int(num_ranks, 1):
            raise ValueError(
                f"num_ranks is {num_ranks!r}; allowed: an int from 1 to {limits.INT32_MAX}"
            )
        if self.num_experts % num_ranks and not self.pad_experts:
            raise ValueError(
                f"num_ranks is {num_ranks!r}; it must divide num_experts ({self.num_experts}), or "
                "EpConfig.pad_experts be True"
            )
        return -(-self.num_experts // int(num_ranks))


def _padded_rows(rows: int, num_groups: int, align: int) -> int:
    """`rows` rows in at most `num_groups` groups, each with the most padding there can be."""
    return rows + min(num_groups, rows) * (align - 1)
