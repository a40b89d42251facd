# SPDX-License-Identifier: Apache-2.0
"""How the primitives of `primitives.py` are differentiated; importing this registers the rules."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.interpreters import ad

from jax_ep._src.backends.operands import weighted_rows_tangent
from jax_ep._src.backends.xla.primitives import combine_p, exchange_p
from jax_ep._src.spec import OpSpec
from jax_ep._src.types import DispatchHandle


def _of_those_not_zero(
    values: Sequence[Any], leaves: Sequence[Any], has: tuple[bool, bool], params: dict[str, Any]
) -> list[Any]:
    """The exchange of those of `values`, one for each of `has`, that are not zero; else None."""
    given = iter(values)
    slots = [next(given) if there_is else None for there_is in has]
    used = [v is not None and type(v) is not ad.Zero for v in slots]
    kept = [v for v, is_used in zip(slots, used, strict=True) if is_used]
    params = {**params, "spec": params["spec"].for_cotangents(), "has": tuple(used)}
    outs = iter(exchange_p.bind(*kept, *leaves, **params)) if kept else iter(())
    results = [next(outs) if is_used else None for is_used in used]
    return [r for r, there_is in zip(results, has, strict=True) if there_is]


def _exchange_jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
    has = params["has"]
    outs = exchange_p.bind(*primals, **params)
    dots = _of_those_not_zero(tangents[: sum(has)], primals[sum(has) :], has, params)
    zeros = [ad.Zero(jax.typeof(out).to_tangent_aval()) for out in outs]
    return outs, [z if dot is None else dot for dot, z in zip(dots, zeros, strict=True)]


def _exchange_transpose(cotangents: Sequence[Any], *operands: Any, **params: Any) -> list[Any]:
    """There and back are each other's transposes over the same handle."""
    has = params["has"]
    values, leaves = operands[: sum(has)], operands[sum(has) :]
    back = {**params, "there": not params["there"]}
    bars = zip(_of_those_not_zero(cotangents, leaves, has, back), values, strict=True)
    wanted = [bar if ad.is_undefined_primal(value) else None for bar, value in bars]
    return [*wanted, *[None] * len(leaves)]


def _combine_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, spec: OpSpec, tree: Any
) -> Any:
    """Bilinear: the tangent is an unweighted combine of the rows' tangents."""
    y, weights, *leaves = primals
    outs = combine_p.bind(*primals, spec=spec, tree=tree)
    y_dot, weights_dot = (None if type(t) is ad.Zero else t for t in tangents[:2])
    if y_dot is None and weights_dot is None:
        return outs, [ad.Zero(jax.typeof(outs[0]).to_tangent_aval())]
    handle: DispatchHandle = jax.tree.unflatten(tree, leaves)
    rows_dot = weighted_rows_tangent(
        y, weights, y_dot, weights_dot, handle.row_source, handle.row_topk_idx
    )
    params = {"spec": spec.for_cotangents(), "tree": tree, "has": (True, False), "there": False}
    return outs, exchange_p.bind(rows_dot, *leaves, **params)


ad.primitive_jvps[exchange_p] = _exchange_jvp
ad.primitive_jvps[combine_p] = _combine_jvp
ad.primitive_transposes[exchange_p] = _exchange_transpose
