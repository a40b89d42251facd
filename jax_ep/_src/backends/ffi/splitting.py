# SPDX-License-Identifier: Apache-2.0
"""Where `plan_dispatch_p` is taken apart; importing this registers the rules.

Where its plan is enough, where a whole batch has one plan, and where the routing is known and what
travels is not (`jax.linear_transpose`). Not in reverse mode: its tangents are a `dispatch_p` over
the plan (`differentiation.py`), which is not made again. Nor in a group that goes on without ranks
that do not come: both halves must miss the same ones.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.interpreters import batching
from jax.interpreters import partial_eval as pe

from jax_ep._src import compat
from jax_ep._src.backends.ffi.primitives import (
    bind,
    dispatch_p,
    plan_dispatch_p,
    plan_p,
    results_tree,
)
from jax_ep._src.backends.operands import (
    PlanDispatchOperands,
    PlanDispatchResults,
    PlanOperands,
)
from jax_ep._src.batching import one_by_one
from jax_ep._src.spec import OpSpec

_NOT_MAPPED = -1  # for None, which is no leaf


def plan_dispatch_batched(
    args: Sequence[Any], dims: Sequence[Any], *, tree: Any, spec: OpSpec
) -> tuple[list[Any], list[Any]]:
    """One call for each element; but elements of one routing have one plan."""
    operands: PlanDispatchOperands = jax.tree.unflatten(tree, args)
    marked = [_NOT_MAPPED if dim is None else dim for dim in dims]
    dims_of: PlanDispatchOperands = jax.tree.unflatten(tree, marked)
    mapped = any(dim != _NOT_MAPPED for dim in jax.tree.leaves(dims_of.of_plan()))
    if mapped or spec.on_timeout == "mask":
        return one_by_one(plan_dispatch_p, args, dims, tree=tree, spec=spec)
    planned = bind(plan_p, operands.of_plan(), spec=spec)
    dims_of_plan = jax.tree.map(lambda _: _NOT_MAPPED, planned)
    dispatched = operands.of_dispatch(planned.plan)
    leaves, dispatch_tree = jax.tree.flatten(dispatched)
    dispatch_dims = jax.tree.leaves(dims_of.of_dispatch(dims_of_plan.plan))
    outs, out_dims = one_by_one(
        dispatch_p,
        leaves,
        [None if dim == _NOT_MAPPED else dim for dim in dispatch_dims],
        tree=dispatch_tree,
        spec=spec,
    )
    of_plan = jax.tree.leaves(planned)
    return [*of_plan, *outs], [*[None] * len(of_plan), *out_dims]


def _without_dead_code(used: Sequence[bool], eqn: Any) -> tuple[list[bool], Any]:
    """Where nothing of the dispatch is used, the plan alone is made."""
    if not any(used):
        return [False] * len(eqn.invars), None
    tree, spec = eqn.params["tree"], eqn.params["spec"]
    avals = jax.tree.unflatten(tree, [var.aval for var in eqn.invars])
    results = results_tree(plan_dispatch_p, avals, spec)
    used_of: PlanDispatchResults = jax.tree.unflatten(results, used)
    if spec.on_timeout == "mask" or any(jax.tree.leaves(used_of.of_dispatch())):
        return [True] * len(eqn.invars), eqn
    outs: PlanDispatchResults = jax.tree.unflatten(results, eqn.outvars)
    operands: PlanDispatchOperands = jax.tree.unflatten(tree, eqn.invars)
    invars, plan_tree = jax.tree.flatten(operands.of_plan())
    plan_eqn = eqn.replace(
        primitive=plan_p,
        invars=invars,
        outvars=jax.tree.leaves(outs.of_plan()),
        params={"tree": plan_tree, "spec": spec},
    )
    routing = jax.tree.map(lambda _: True, operands.of_plan())
    needed = jax.tree.map(lambda _: False, avals)._replace(**routing._asdict())
    return jax.tree.leaves(needed), plan_eqn


def _partially_known(trace: Any, *tracers: Any, tree: Any, spec: OpSpec) -> list[Any]:
    """The plan is known as soon as the routing is."""
    operands: PlanDispatchOperands = jax.tree.unflatten(tree, tracers)
    routing = jax.tree.leaves(operands.of_plan())
    apart = all(t.is_known() for t in routing) and not all(t.is_known() for t in tracers)
    if not apart or spec.on_timeout == "mask":
        return trace.default_process_primitive(
            plan_dispatch_p, tracers, {"tree": tree, "spec": spec}
        )
    known: PlanOperands = jax.tree.map(lambda t: t.pval.get_known(), operands.of_plan())
    planned = bind(plan_p, known, spec=spec)
    leaves, dispatch_tree = jax.tree.flatten(operands.of_dispatch(planned.plan))
    outs = trace.default_process_primitive(
        dispatch_p, leaves, {"tree": dispatch_tree, "spec": spec}
    )
    return [*jax.tree.leaves(planned), *outs]


batching.primitive_batchers[plan_dispatch_p] = plan_dispatch_batched
compat.set_dead_code_rule(plan_dispatch_p, _without_dead_code)
pe.custom_partial_eval_rules[plan_dispatch_p] = _partially_known
