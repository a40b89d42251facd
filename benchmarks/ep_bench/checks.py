# SPDX-License-Identifier: Apache-2.0
"""Whether a variant is right, before it is timed.

With experts that return what they get and nothing dropped, the result is known in closed form;
`Expected.of` derives it and has the library's oracle confirm it on some of the channels (routing
and sums are the same for all of them, and the oracle is slow). Variants are compared with the
closed form in every element.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ep_bench.cases import Case, GpuCase, Inputs
from jax_ep import reference

NUM_ORACLE_CHANNELS = 4
MAX_ORACLE_TOKENS = 1024  # of a rank, where GPUs wait
UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float32": 2.0**-24}


_FP8_BLOCK, _FP8_LARGEST, _FP8_LEAST_SCALE = 128, 448.0, 1e-4 / 448.0


class WrongResultError(AssertionError):
    """A variant, or the oracle, differs from what is expected by more than rounding can."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """Values of a case in one dtype, and how far from them roundings may lead.

    Attributes:
        values: name -> float64 array: `out` and `x_bar` `[R * T, H]`, `topk_weights_bar`
            `[R * T, K]`.
        bounds: like `values`: the largest allowed absolute difference.
    """

    values: dict[str, np.ndarray]
    bounds: dict[str, np.ndarray]

    @classmethod
    def of(cls, case: Case | GpuCase, inputs: Inputs, dtype: str) -> "Expected":
        """Works out the closed form, and has the oracle confirm it.

        Bounds, with `u` the dtype's unit roundoff: see `_weighted`; and the gradient of a weight
        is a product of two tokens. Its H terms have random signs, so a running sum that is rounded
        to the dtype at every step goes astray by about `u H / sqrt(6)` times a term's root mean
        square (errors of the size of the running sum, which grows like a random walk, added up at
        random); `u H` times it is allowed.
        """
        terms = inputs.x.astype(np.float64) * inputs.out_bar.astype(np.float64)
        inner = terms.sum(axis=1, keepdims=True)
        rms = np.sqrt(np.mean(terms**2, axis=1, keepdims=True))
        num_topk = inputs.topk_idx.shape[1]
        both = {
            "out": _weighted(inputs.x, inputs.topk_weights, dtype, case.num_ranks),
            "x_bar": _weighted(inputs.out_bar, inputs.topk_weights, dtype, case.num_ranks),
            "topk_weights_bar": (
                np.repeat(inner, num_topk, axis=1),
                np.repeat(UNIT_ROUNDOFF[dtype] * terms.shape[1] * rms, num_topk, axis=1),
            ),
        }
        expected = cls(
            values={name: value for name, (value, _) in both.items()},
            bounds={name: bound for name, (_, bound) in both.items()},
        )
        expected._check_against_oracle(case, inputs)
        return expected

    @classmethod
    def of_outputs(
        cls,
        x: np.ndarray,
        topk_weights: np.ndarray,
        dtype: str,
        num_ranks: int,
        *,
        fp8_wire: bool = False,
    ) -> "Expected":
        """`out` alone, of some of the tokens; the oracle is not asked."""
        value, bound = _weighted(x, topk_weights, dtype, num_ranks, fp8_wire=fp8_wire)
        return cls(values={"out": value}, bounds={"out": bound})

    def _check_against_oracle(self, case: Case | GpuCase, inputs: Inputs) -> None:
        hidden = inputs.x.shape[1]
        channels = np.linspace(0, hidden - 1, min(NUM_ORACLE_CHANNELS, hidden))
        channels = channels.astype(int)

        def by_rank(array: np.ndarray) -> np.ndarray:
            return array.reshape(case.num_ranks, -1, array.shape[-1])

        recv = reference.dispatch(
            by_rank(inputs.x[:, channels]),
            by_rank(inputs.topk_idx),
            by_rank(inputs.topk_weights),
            num_experts=case.num_experts,
            dtype=np.float64,
            recv_capacity=case.recv_capacity,
        )
        if recv.num_dropped.any():
            raise WrongResultError(f"{case.name}: the capacity drops rows; nothing may be dropped")
        out = reference.combine(recv.x, recv.plan, recv.weights, exact_bits=False)
        x_bar = reference.combine_vjp(
            recv.x, recv.plan, recv.weights, by_rank(inputs.out_bar[:, channels])
        )[0]
        x_bar = reference.dispatch_vjp(recv.plan, x_bar)[0]
        for name, oracle in (("out", out), ("x_bar", x_bar)):
            closed_form = self.values[name][:, channels]
            if not np.allclose(oracle.reshape(closed_form.shape), closed_form, rtol=1e-12):
                raise WrongResultError(f"{case.name}: the oracle's {name} is not the closed form")

    def check(self, what: str, names: Sequence[str], arrays: Sequence[np.ndarray]) -> float:
        """Compares a result with what is expected.

        Args:
            what: is checked, for the message.
            names: of `values`.
            arrays: float64, as many.

        Returns:
            The largest difference, as a fraction of what is allowed.

        Raises:
            WrongResultError: it is more than 1.
        """
        worst = 0.0
        for name, array in zip(names, arrays, strict=True):
            off = np.abs(array - self.values[name])
            used = np.divide(off, self.bounds[name], out=np.zeros_like(off), where=off != 0)
            worst = max(worst, float(used.max()))
            if not used.max() <= 1:  # NaN is not
                token, column = np.unravel_index(np.argmax(used), used.shape)
                raise WrongResultError(
                    f"{what}: {name}[{token}, {column}] is {array[token, column]}, expected "
                    f"{self.values[name][token, column]} within {self.bounds[name][token, column]}"
                )
        return worst


def _weighted(
    rows: np.ndarray,
    topk_weights: np.ndarray,
    dtype: str,
    num_ranks: int,
    *,
    fp8_wire: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows times the sum of their weights, and how far from that roundings may lead.

    A sum over selections is rounded once for its weights, once for each product and at each of at
    most K + R - 1 additions and at the end, in any of the variants; all its terms have one sign.
    On an FP8 wire rows are rounded to the wire's format first, and then to the dtype.
    """
    exact = rows.astype(np.float64)
    total = topk_weights.astype(np.float64).sum(axis=1, keepdims=True)
    value = exact * total
    num_roundings = topk_weights.shape[1] + num_ranks + 3
    if not fp8_wire:
        growth = (1 + UNIT_ROUNDOFF[dtype]) ** num_roundings - 1
        return value, growth * np.abs(value)
    growth = (1 + UNIT_ROUNDOFF[dtype]) ** (num_roundings + 1) - 1
    off = _fp8_rounding(exact)
    return value, total * (growth * np.abs(exact) + (1 + growth) * off)


def _fp8_rounding(rows: np.ndarray) -> np.ndarray:
    """How far e4m3 with a scale for each 128 channels is from a row: half of its last bit's value.

    3 bits of mantissa; below the scale / 64, the last bit's value is the scale / 512.
    """
    size = np.abs(rows)
    starts = np.arange(0, rows.shape[1], _FP8_BLOCK)
    scale = np.maximum.reduceat(size, starts, axis=1) / _FP8_LARGEST
    scale = np.repeat(np.maximum(scale, _FP8_LEAST_SCALE), _FP8_BLOCK, axis=1)[:, : rows.shape[1]]
    return np.maximum(size / 16, scale / 1024)


def check_against_oracle(case: GpuCase) -> None:
    """Compares the closed form, which results are compared with, with the oracle on four channels.

    It is slow, and GPUs wait for it: of more tokens than `MAX_ORACLE_TOKENS`, a case with so many.

    Raises:
        WrongResultError: it does not, or rows would be dropped.
    """
    case = dataclasses.replace(case, num_tokens=min(case.num_tokens, MAX_ORACLE_TOKENS))
    rng = np.random.default_rng(3)
    total = case.num_ranks * case.num_tokens
    topk_idx = case.topk_idx.reshape(total, -1)
    x, out_bar = rng.standard_normal((2, total, 4), np.float32)
    weights = rng.uniform(0.1, 1.0, topk_idx.shape).astype(np.float32)
    inputs = Inputs(x=x, topk_idx=topk_idx, topk_weights=weights, out_bar=out_bar)
    Expected.of(case, inputs, "float32")
