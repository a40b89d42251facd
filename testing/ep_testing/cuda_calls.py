# SPDX-License-Identifier: Apache-2.0
"""Well-formed calls of the handlers for platform CUDA, by one rank, on arrays of NumPy."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import jax_ep
from ep_testing.fake_cudart import FakeCudart, XlaError
from ep_testing.programs import make_mesh

# Results of each handler; what else it takes is an operand.
RESULTS = {
    "plan": (
        *("slot", "row_source", "row_topk_idx", "source_slot"),
        *("group_sizes", "tokens_per_expert", "num_dropped"),
    ),
    "dispatch": ("rows", "rows_scales", "row_scalars", "row_dots"),
    "combine": ("out", "token_scalars"),
}
# No products are made with the plan.
RESULTS["plan_dispatch"] = (
    *RESULTS["plan"], *(name for name in RESULTS["dispatch"] if name != "row_dots"),
)  # fmt: skip
OPERATIONS = tuple(RESULTS)
# Half -> the operation that it is half of.
HALVES = {
    "dispatch_start": "plan_dispatch",
    "dispatch_done": "plan_dispatch",
    "combine_start": "combine",
    "combine_done": "combine",
}
RESULTS |= {
    half: ("ticket",) if half.endswith("_start") else RESULTS[whole]
    for half, whole in HALVES.items()
}
DTYPES = ("float32", "bfloat16", "float16")  # in the order in which they are numbered


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a call; its letters are those of the documentation."""

    num_ranks: int = 2
    num_experts: int = 8
    num_topk: int = 2
    num_tokens: int = 3
    hidden: int = 16
    recv_capacity: int = 10
    layout: str = "expert"
    dtype: str = "float32"
    x_dtype: str | None = None  # None: `dtype`
    rows_dtype: str | None = None
    scalars: bool = True
    weighted: bool = True
    products: bool = False  # of dispatch
    masked: bool = False  # the call has a mask of ranks
    masks: bool = False  # it says which ranks were missing

    @property
    def wire_dtype(self) -> str | None:
        """Of the config of a group that serves the call."""
        return self.x_dtype or self.rows_dtype

    def attributes(self, group_id: int) -> dict[str, np.generic]:
        """The dictionary that every call has."""
        return {
            "ep.group_id": np.int64(group_id),
            "ep.num_ranks": np.int32(self.num_ranks),
            "ep.num_experts": np.int32(self.num_experts),
            "ep.num_topk": np.int32(self.num_topk),
            "ep.expert_alignment": np.int32(1),
            "ep.layout": np.int32(("expert", "rank").index(self.layout)),
        }


def _buffers_of_one(operation: str, sizes: Sizes) -> dict[str, np.ndarray]:
    """The arrays of a call, by name, in the order in which the handler takes them."""
    T, K, C, H = sizes.num_tokens, sizes.num_topk, sizes.recv_capacity, sizes.hidden
    local = sizes.num_experts // sizes.num_ranks
    by_rank = sizes.layout == "rank"
    rows_per_token = 1 if by_rank else min(K, local)
    per_row = (C, K) if by_rank else (C,)

    def ints(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int32)

    def floats(there: bool, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape if there else (0,), np.float32)

    def rows(count: int, dtype: str | None = None) -> np.ndarray:
        return np.zeros((count, H), dtype or sizes.dtype)

    def scales(count: int, dtype: str | None) -> np.ndarray:
        return floats(dtype is not None, (count, -(-H // 128)))

    program_rank, topk_idx, slot = ints(1), ints(T, K), ints(T, K)
    row_source, source_slot = ints(C), ints(sizes.num_ranks * T, rows_per_token)
    row_topk_idx = ints(C, K) if by_rank else ints(0)
    if operation == "plan":
        return {
            "program_rank": program_rank, "topk_idx": topk_idx,
            "slot": slot, "row_source": row_source, "row_topk_idx": row_topk_idx,
            "source_slot": source_slot, "group_sizes": ints(sizes.num_ranks if by_rank else local),
            "tokens_per_expert": ints(local), "num_dropped": ints(),
        }  # fmt: skip
    if operation == "dispatch":
        return {
            "program_rank": program_rank, "x": rows(T, sizes.x_dtype),
            "x_scales": scales(T, sizes.x_dtype),
            "token_scalars": floats(sizes.scalars, (T, K)),
            "row_weights": floats(sizes.products, (C,)),
            "y": rows(C) if sizes.products else rows(C)[:, :0],
            "topk_idx": topk_idx, "slot": slot,
            "row_source": row_source, "source_slot": source_slot,
            "rows": rows(C, sizes.rows_dtype), "rows_scales": scales(C, sizes.rows_dtype),
            "row_scalars": floats(sizes.scalars, per_row),
            "row_dots": floats(sizes.products, (C,)),
        }  # fmt: skip
    return {
        "program_rank": program_rank, "y": rows(C), "weights": floats(sizes.weighted, per_row),
        "row_scalars": floats(sizes.scalars, per_row), "topk_idx": topk_idx, "slot": slot,
        "row_topk_idx": row_topk_idx, "source_slot": source_slot,
        "out": rows(T), "token_scalars": floats(sizes.scalars, (T, K)),
    }  # fmt: skip


def buffers(operation: str, sizes: Sizes) -> dict[str, np.ndarray]:
    """The arrays of a call, by name, in the order in which the handler takes them."""
    if operation in HALVES:
        return _buffers_of_half(operation, sizes)
    if operation != "plan_dispatch":
        arrays = _with_mask(_buffers_of_one(operation, sizes), operation, sizes)
        return _with_missing_ranks(arrays, sizes)
    both = _buffers_of_one("dispatch", sizes) | _buffers_of_one("plan", sizes)
    operands = ("program_rank", "x", "x_scales", "token_scalars", "topk_idx")
    arrays = {name: both[name] for name in (*operands, *RESULTS[operation])}
    return _with_missing_ranks(_with_mask(arrays, operation, sizes), sizes)


def _with_missing_ranks(arrays: dict[str, np.ndarray], sizes: Sizes) -> dict[str, np.ndarray]:
    """Where a call says who was missing, it does in its last result; else that is not there."""
    if not sizes.masks:
        return arrays
    return arrays | {"missing_ranks": np.zeros(sizes.num_ranks, np.bool_)}


def _with_mask(
    arrays: dict[str, np.ndarray], operation: str, sizes: Sizes
) -> dict[str, np.ndarray]:
    """A mask is the last operand; a call without one has fewer."""
    if not sizes.masked:
        return arrays
    mask = {"rank_mask": np.ones(sizes.num_ranks, np.bool_)}
    operands = {name: array for name, array in arrays.items() if name not in RESULTS[operation]}
    return operands | mask | {name: arrays[name] for name in RESULTS[operation]}


def _buffers_of_half(operation: str, sizes: Sizes) -> dict[str, np.ndarray]:
    """The operands of the whole; of a second half the ticket, an array after that, and results."""
    whole = HALVES[operation]
    arrays = buffers(whole, sizes)
    operands = {name: array for name, array in arrays.items() if name not in RESULTS[whole]}
    ticket = {"ticket": np.zeros(2, np.uint32)}
    if operation.endswith("_start"):
        return operands | ticket
    after = {"after": np.zeros(3, np.float16)}
    return operands | ticket | after | {name: arrays[name] for name in RESULTS[whole]}


def call(
    fake: FakeCudart,
    operation: str,
    group_id: int,
    arrays: dict[str, np.ndarray],
    sizes: Sizes,
    *,
    device: int = 0,
    stream: int = 0,
    **attributes: np.generic,
) -> None:
    """Calls a handler; `attributes` replace some of the call's, "ep_..." one of the dictionary."""
    all_attributes = {**sizes.attributes(group_id), "call_site": np.int32(0)}
    if "dispatch" in operation:
        all_attributes |= {
            "dtype": np.int32(DTYPES.index(sizes.dtype)),
            "wire": np.int32(sizes.wire_dtype is not None),
            "zero_fill": np.bool_(True),
        }
    if operation.startswith("combine"):
        all_attributes["domain_size"] = np.int32(sizes.num_ranks)
    if operation == "dispatch_start":
        all_attributes["recv_capacity"] = np.int64(sizes.recv_capacity)
    all_attributes |= {
        name.replace("ep_", "ep.", 1) if name.startswith("ep_") else name: value
        for name, value in attributes.items()
    }
    results = (*RESULTS[operation], *(["missing_ranks"] if "missing_ranks" in arrays else []))
    fake.call(
        f"jax_ep_{operation}",
        [array for name, array in arrays.items() if name not in results],
        [arrays[name] for name in results],
        all_attributes,
        device=device,
        stream=stream,
    )


def refusal(*args: Any, **kwargs: Any) -> str:
    """The message with which a handler refuses a `call`."""
    with pytest.raises(XlaError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@contextlib.contextmanager
def groups_of_two(**defaults: Any) -> Iterator[Callable[..., jax_ep.EpGroup]]:
    """Makes groups of two ranks, on devices 0 and 1, and closes them at the end.

    `defaults` are fields of the config; so are the arguments of what it yields, but for `timeout`
    and `on_timeout`.
    """
    made: list[jax_ep.EpGroup] = []
    sizes = {
        "num_experts": 8, "num_topk": 2, "hidden": 16, "max_tokens_per_rank": 4, "dtype": "float32",
    }  # fmt: skip

    def make(timeout: float = 60.0, on_timeout: str = "error", **config: Any) -> jax_ep.EpGroup:
        config = jax_ep.EpConfig(**{**sizes, **defaults, **config})
        mesh = make_mesh((2,), ("expert",))
        made.append(jax_ep.EpGroup(mesh, "expert", config, timeout=timeout, on_timeout=on_timeout))
        return made[-1]

    yield make
    for group in made:
        group.close()
