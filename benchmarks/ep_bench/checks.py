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

from ep_bench.cases import NUM_RANKS, Case, Inputs
from jax_ep import reference

NUM_ORACLE_CHANNELS = 4
UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float32": 2.0**-24}


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
    def of(cls, case: Case, inputs: Inputs, dtype: str) -> "Expected":
        """Works out the closed form, and has the oracle confirm it.

        Bounds, with `u` the dtype's unit roundoff: a sum over selections is rounded once for its
        weights, once for each product and at each of at most K + R - 1 additions and at the end,
        in any of the variants; all its terms have one sign. The gradient of a weight is a product
        of two tokens. Its H terms have random signs, so a running sum that is rounded to the
        dtype at every step goes astray by about `u H / sqrt(6)` times a term's root mean square
        (errors of the size of the running sum, which grows like a random walk, added up at
        random); `u H` times it is allowed.
        """
        x, out_bar = inputs.x.astype(np.float64), inputs.out_bar.astype(np.float64)
        total = inputs.topk_weights.astype(np.float64).sum(axis=1, keepdims=True)
        terms = x * out_bar
        inner = terms.sum(axis=1, keepdims=True)
        values = {
            "out": x * total,
            "x_bar": out_bar * total,
            "topk_weights_bar": np.repeat(inner, case.num_topk, axis=1),
        }
        unit = UNIT_ROUNDOFF[dtype]
        growth = (1 + unit) ** (case.num_topk + NUM_RANKS + 3) - 1
        rms = np.sqrt(np.mean(terms**2, axis=1, keepdims=True))
        bounds = {
            "out": growth * np.abs(values["out"]),
            "x_bar": growth * np.abs(values["x_bar"]),
            "topk_weights_bar": np.broadcast_to(
                unit * case.hidden * rms, values["topk_weights_bar"].shape
            ),
        }
        expected = cls(values=values, bounds=bounds)
        expected._confirm(case, inputs)
        return expected

    def _confirm(self, case: Case, inputs: Inputs) -> None:
        channels = np.linspace(0, case.hidden - 1, min(NUM_ORACLE_CHANNELS, case.hidden))
        channels = channels.astype(int)

        def by_rank(array: np.ndarray) -> np.ndarray:
            return array.reshape(NUM_RANKS, -1, array.shape[-1])

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
