# SPDX-License-Identifier: Apache-2.0
"""From options to a model: the checkpoint, the group, the layers, the programs."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

import jax_ep
from jax_ep.flax import stored_from_logical
from jax_ep.flax.nnx import MoE
from moe_lm.build import build
from moe_lm.checkpoints import Checkpoints
from moe_lm.nnx_model import LanguageModel
from moe_lm.options import Options
from moe_lm.training import initial_state, make_optimizer, train
from moe_serve.experts import FixedExperts, PlacedExperts
from moe_serve.model import EXPERT_WEIGHTS, ServingModel
from moe_serve.options import ServeOptions
from moe_serve.telemetry import Telemetry


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that is compiled.

    Attributes:
        model: with an empty cache.
        experts: where they are.
        telemetry: what these tell.
        title: a line about the model and where it runs.
    """

    model: ServingModel
    experts: FixedExperts | PlacedExperts
    telemetry: Telemetry
    title: str


@contextlib.contextmanager
def loaded(serve: ServeOptions, options: Options) -> Iterator[Loaded]:
    """Trains where there is no checkpoint, loads, and compiles; says what it does.

    Raises:
        ValueError: a checkpoint is of another model, or there are too few devices.
        jax_ep.EpUnavailable: the backend that was asked for cannot serve.
    """
    options = _trained(serve, options)
    setup = build(options)
    with contextlib.ExitStack() as stack:
        stack.enter_context(setup.group)
        state = initial_state(options, setup, make_optimizer(options))
        with Checkpoints(options.out / "checkpoints", options.identity) as checkpoints:
            step, state = checkpoints.restore(state)
        telemetry = Telemetry()
        model, experts = model_and_experts(
            serve, options, setup.group, state.params, telemetry, stack
        )
        for width in (1, *serve.widths):
            print(f"compiling for rows of {width}", flush=True)
            model.compile(width)
        if isinstance(experts, PlacedExperts):
            print("compiling for weights that move", flush=True)
            experts.compile()
        model.take_counts()
        group = setup.group
        title = (
            f"a model of {step} steps, mesh data {options.mesh[0]} x expert {options.mesh[1]} of "
            f"{group.mesh.devices.flat[0].platform}, backend {group.backend}, "
            f"{serve.slots * options.num_devices} slots of {serve.max_len} bytes"
        )
        yield Loaded(model, experts, telemetry, title)


def model_and_experts(
    serve: ServeOptions,
    options: Options,
    group: jax_ep.EpGroup,
    params: Any,
    telemetry: Telemetry,
    stack: contextlib.ExitStack,
) -> tuple[ServingModel, FixedExperts | PlacedExperts]:
    """The model with an empty cache, from the parameters of training, and where its experts are.

    Args:
        serve: with or without spare slots.
        options: of the model.
        group: of training, which serves where experts have no copies.
        params: of training.
        telemetry: what is told.
        stack: closes what is opened here.
    """
    watched = {"num_topk": options.topk, "every": serve.rebalance_every}
    if not serve.spare_slots:
        model = _serving_model(serve, options, group, params, None)
        num_ranks = group.num_ranks
        return model, FixedExperts(model, telemetry, num_ranks=num_ranks, **watched)
    slots = options.experts // group.num_ranks + serve.spare_slots
    even = np.ones((options.layers, options.experts))
    placement = jax_ep.plan_placement(even, num_ranks=group.num_ranks, slots_per_rank=slots)
    config = dataclasses.replace(group.config, num_experts=slots * group.num_ranks)
    group = stack.enter_context(_group_like(group, config))
    model = _serving_model(serve, options, group, params, placement)
    rows = options.ffn * slots  # of hidden elements, of all slots of a rank
    of_weights = jax_ep.EpConfig(
        num_experts=config.num_experts,
        num_topk=placement.max_copies,
        hidden=options.hidden,
        max_tokens_per_rank=rows,
        recv_capacity=rows,
        dtype=config.dtype,
        low_latency_tokens=0,
    )
    weight_group = stack.enter_context(_group_like(group, of_weights))
    logical = [
        {name: np.asarray(layer["moe"][name].get_value()) for name in EXPERT_WEIGHTS}
        for _, layer in sorted(params["blocks"].items())
    ]
    return model, PlacedExperts(model, telemetry, placement, logical, group=weight_group, **watched)


def _group_like(group: jax_ep.EpGroup, config: jax_ep.EpConfig) -> jax_ep.EpGroup:
    return jax_ep.EpGroup(group.mesh, group.axis_name, config, backend=group.backend)


def _serving_model(
    serve: ServeOptions,
    options: Options,
    group: jax_ep.EpGroup,
    params: Any,
    placement: jax_ep.ExpertPlacement | None,
) -> ServingModel:
    number = itertools.count()

    def make_moe(rngs: nnx.Rngs) -> MoE:
        arrays = None if placement is None else placement.layer(next(number))
        shared = options.shared_experts
        return MoE(group, ffn=options.ffn, num_shared_experts=shared, placement=arrays, rngs=rngs)

    model = LanguageModel(options, make_moe, nnx.Rngs(options.seed))
    shardings = [
        {name: getattr(block.moe, name).get_value().sharding for name in EXPERT_WEIGHTS}
        for block in model.blocks
    ]
    nnx.update(model, params)
    if placement is not None:
        for layer, block in enumerate(model.blocks):
            logical = {name: getattr(block.moe, name).get_value() for name in EXPERT_WEIGHTS}
            stored = stored_from_logical(logical, placement.layer(layer))
            for name, weight in jax.device_put(stored, shardings[layer]).items():
                getattr(block.moe, name).set_value(weight)
    return ServingModel(
        group, model, slots=serve.slots, max_len=serve.max_len, window=options.seq_len
    )


def _trained(serve: ServeOptions, options: Options) -> Options:
    """The options of a model that has a checkpoint."""
    if (options.out / "checkpoints").is_dir():
        return options
    # Beside what train_moe_lm.py writes, which has other options.
    short = dataclasses.replace(
        options, out=options.out / "for_serving", steps=serve.train_steps, sample_bytes=0
    )
    if not any((short.out / "checkpoints").glob("[0-9]*")):
        print(f"{options.out} has no checkpoint: training for {short.steps} steps", flush=True)
        if train(short):
            raise ValueError("argument --out: training has failed")
    return short
