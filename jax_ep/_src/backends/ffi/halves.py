# SPDX-License-Identifier: Apache-2.0
"""How the halves of an exchange are transformed; importing this registers the rules.

The first half copies what its rank brings to where the second one finds it by a ticket; on GPUs it
sends it to the peers. The rows themselves are operands of both: of the second for derivatives and
`vmap`, and, on GPUs, because what stays on its rank is not sent.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, Var
from jax.interpreters import ad, batching
from jax.interpreters import partial_eval as pe

from jax_ep._src import compat
from jax_ep._src.backends.ffi.differentiation import combine_tangents, plan_dispatch_tangents
from jax_ep._src.backends.ffi.primitives import (
    bind,
    combine_done_p,
    combine_p,
    combine_start_p,
    dispatch_done_p,
    dispatch_start_p,
)
from jax_ep._src.backends.ffi.splitting import plan_dispatch_batched
from jax_ep._src.backends.tangents import tangents_of
from jax_ep._src.batching import one_by_one
from jax_ep._src.spec import OpSpec

# --- derivatives -------------------------------------------------------------------------------


def _start_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, primitive: Primitive, **params: Any
) -> Any:
    del tangents  # a ticket has none: those of the rows go to the second half with the rows
    results = primitive.bind(*primals, **params)
    return results, tangents_of(results, [None])


def _done_jvp(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    primitive: Primitive,
    tangents_of_whole: Callable[..., list[Any]],
    tree: Any,
    spec: OpSpec,
) -> Any:
    """The tangents are those of the exchange in one piece."""
    operands = jax.tree.unflatten(tree, primals)
    dots = jax.tree.unflatten(tree, tangents)
    results = bind(primitive, operands, spec=spec)
    return jax.tree.leaves(results), tangents_of_whole(spec, operands.sent, dots.sent, results)


def _not_transposed(*args: Any, name: str, **params: Any) -> NoReturn:
    del args, params
    raise ValueError(
        f"{name} is transposed by jax.linear_transpose; allowed: the exchange in one piece, or "
        "jax.vjp and what is made of it"
    )


# --- rematerialization -------------------------------------------------------------------------


def _never_saved(
    saveable: Any, unknown: Sequence[bool], instantiated: Sequence[bool], eqn: Any
) -> tuple[Any, Any, list[bool], list[bool], list[Any]]:
    """Whatever the policy: where a second half is run again, so is its first half.

    A ticket that was saved would be used twice. Where the results of the second half are saved,
    the first half that is run again is dead code.
    """
    del saveable
    residuals = [
        var
        for var, there in zip(eqn.invars, instantiated, strict=True)
        if isinstance(var, Var) and not there
    ]
    num_results = len(eqn.outvars)
    is_unknown = any(unknown)
    known = None if is_unknown else eqn
    return known, eqn, [is_unknown] * num_results, [True] * num_results, residuals


# --- batching ----------------------------------------------------------------------------------

_NOT_MAPPED = -1  # for None, which is no leaf


def _start_batched(
    args: Sequence[Any], dims: Sequence[Any], **params: Any
) -> tuple[list[Any], list[int]]:
    """Begins nothing: as many flights as the batch has elements cannot be open.

    The second half, which knows the operands too, makes the exchanges one after the other.
    """
    del params
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    tickets = jnp.zeros((size, 2), jnp.uint32)
    return list(compat.as_varying(compat.varying_axes(*args), tickets)), [0]


def _done_batched(
    args: Sequence[Any],
    dims: Sequence[Any],
    *,
    primitive: Primitive,
    whole_batched: Callable[..., tuple[list[Any], list[Any]]],
    tree: Any,
    spec: OpSpec,
) -> tuple[list[Any], list[Any]]:
    operands = jax.tree.unflatten(tree, args)
    marked = [_NOT_MAPPED if dim is None else dim for dim in dims]
    dims_of = jax.tree.unflatten(tree, marked)
    if dims_of.ticket == _NOT_MAPPED:  # begun outside of the `vmap`: one exchange for all elements
        results = primitive.bind(*args, tree=tree, spec=spec)
        return results, [None] * len(results)
    leaves, whole_tree = jax.tree.flatten(operands.sent)
    leaves, _ = jax.lax.optimization_barrier((leaves, operands.after))
    dims = [None if dim == _NOT_MAPPED else dim for dim in jax.tree.leaves(dims_of.sent)]
    return whole_batched(leaves, dims, tree=whole_tree, spec=spec)


_combine_batched = functools.partial(one_by_one, combine_p)
for _start_p, _done_p, _whole_batched, _tangents in (
    (dispatch_start_p, dispatch_done_p, plan_dispatch_batched, plan_dispatch_tangents),
    (combine_start_p, combine_done_p, _combine_batched, combine_tangents),
):
    ad.primitive_jvps[_start_p] = functools.partial(_start_jvp, primitive=_start_p)
    ad.primitive_jvps[_done_p] = functools.partial(
        _done_jvp, primitive=_done_p, tangents_of_whole=_tangents
    )
    for _p in (_start_p, _done_p):
        ad.primitive_transposes[_p] = functools.partial(_not_transposed, name=_p.name)
    pe.partial_eval_jaxpr_custom_rules[_start_p] = _never_saved
    batching.primitive_batchers[_start_p] = _start_batched
    batching.primitive_batchers[_done_p] = functools.partial(
        _done_batched, primitive=_done_p, whole_batched=_whole_batched
    )
