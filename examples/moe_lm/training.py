# SPDX-License-Identifier: Apache-2.0
"""The training loop."""

import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_ep
from jax_ep.flax.nnx import LayerStats
from moe_lm.build import Flavor, Setup, build, place
from moe_lm.checkpoints import Checkpoints
from moe_lm.corpus import Corpus, unigram_entropy
from moe_lm.generation import Writer, printable
from moe_lm.metrics import Metrics, StepMetrics
from moe_lm.options import Options
from moe_lm.plots import plot_expert_load, plot_losses
from moe_lm.progress import Progress

PROMPT = b"\n    def "
TEMPERATURE = 0.7


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that a step changes.

    Attributes:
        params: of the model.
        opt_state: of the optimizer, the number of steps included.
    """

    params: Any
    opt_state: Any


def train(options: Options) -> int:
    """Trains and reports; returns the exit status of the program."""
    try:
        setup = build(options)
    except (ValueError, jax_ep.EpUnavailable) as error:
        print(f"train_moe_lm.py: error: {error}", file=sys.stderr)
        return 2
    with setup.group:
        return _Run(options, setup).run()


def cross_entropy(model: Flavor, params: Any, text: jax.Array) -> tuple[jax.Array, Any]:
    """Nats per byte of `[B, S + 1]` text, and the statistics of the layers, stacked."""
    logits, layers = model.apply(params, text[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
    return losses.mean(), jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def make_optimizer(options: Options) -> optax.GradientTransformation:
    """AdamW with a linear warm-up, then a cosine to a tenth of the learning rate."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=options.lr / (options.warmup + 1),
        peak_value=options.lr,
        warmup_steps=options.warmup,
        decay_steps=max(options.steps, options.warmup + 1),
        end_value=options.lr / 10,
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)
    )


def initial_state(
    options: Options, setup: Setup, optimizer: optax.GradientTransformation
) -> TrainState:
    """Before the first step, on the devices of the mesh."""
    params = setup.model.init(options.seed)
    # What Flax's metadata has not placed yet goes to every device.
    mesh = setup.replicated.mesh

    def placed(leaf: jax.Array) -> jax.Array:
        is_placed = getattr(leaf.sharding, "mesh", None) == mesh
        return leaf if is_placed else place(leaf, setup.replicated)

    params = jax.tree.map(placed, params)
    opt_state = jax.tree.map(placed, optimizer.init(params))
    return TrainState(params=params, opt_state=opt_state)


def make_step(
    options: Options, model: Flavor, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, jax.Array], tuple[TrainState, jax.Array, LayerStats]]:
    """One step: state and `[B, S + 1]` text to the next state, the loss, the statistics."""

    def objective(params: Any, text: jax.Array) -> tuple[jax.Array, Any]:
        loss, stats = cross_entropy(model, params, text)
        total = loss + options.balance_loss * stats.load_balance_loss.mean()
        return total + options.z_loss * stats.router_z_loss.mean(), (loss, stats)

    def step(state: TrainState, text: jax.Array) -> tuple[TrainState, jax.Array, LayerStats]:
        (_, (loss, stats)), gradient = jax.value_and_grad(objective, has_aux=True)(
            state.params, text
        )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params=params, opt_state=opt_state), loss, stats

    return step


class _Run:
    """One run of the program, from parameters to plots."""

    def __init__(self, options: Options, setup: Setup) -> None:
        self.options = options
        self.setup = setup
        self.corpus = Corpus.of_standard_library()
        shape = {"batch": options.batch, "seq_len": options.seq_len}
        self.held_out = self.corpus.held_out_batches(options.eval_batches, **shape)
        self.unigram = unigram_entropy(self.held_out)
        self.optimizer = make_optimizer(options)
        self.state = initial_state(options, setup, self.optimizer)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        self.step = jax.jit(
            make_step(options, setup.model, self.optimizer),
            donate_argnums=0,
            out_shardings=(shardings, setup.replicated, setup.replicated),
        )
        self.held_out_step = jax.jit(
            lambda params, text: cross_entropy(setup.model, params, text)[0],
            out_shardings=setup.replicated,
        )

    def run(self) -> int:
        """Trains from the newest checkpoint or from the start."""
        options = self.options
        options.out.mkdir(parents=True, exist_ok=True)
        with Checkpoints(options.out / "checkpoints", options.identity) as checkpoints:
            if not options.resume:
                checkpoints.clear()
            try:
                first, self.state = checkpoints.restore(self.state)
            except ValueError as error:
                print(f"train_moe_lm.py: error: {error}", file=sys.stderr)
                return 2
            path = options.out / "metrics.jsonl" if _is_first() else pathlib.Path(os.devnull)
            with Metrics(path, keep_steps=first) as metrics:
                try:
                    self._train(first, metrics, checkpoints)
                except KeyboardInterrupt:
                    print("interrupted; --resume goes on from the newest checkpoint")
                    return 130
                if first >= options.steps:  # by all processes, whatever their files say
                    held_out = self.held_out_loss()
                    if not metrics.held_out:
                        metrics.add_held_out(options.steps, held_out)
                self._report(metrics)
        return 0

    def _train(self, first: int, metrics: Metrics, checkpoints: Checkpoints) -> None:
        options = self.options
        with Progress(options, first, self._describe(first)) as progress:
            for step in range(first, options.steps):
                begin = time.perf_counter()
                loss, stats = self._one_step(step)
                seconds = time.perf_counter() - begin
                done = step + 1
                entry = StepMetrics.of(done, loss, stats, options.batch * options.seq_len / seconds)
                metrics.add_step(entry)
                progress.step(entry)
                is_last = done == options.steps
                if is_last or _is_due(done, options.eval_every):
                    held_out = self.held_out_loss()
                    metrics.add_held_out(done, held_out)
                    progress.held_out(done, held_out)
                if is_last or _is_due(done, options.checkpoint_every):
                    checkpoints.save(done, self.state)

    def _one_step(self, step: int) -> tuple[float, LayerStats]:
        options = self.options
        text = self.corpus.training_batch(
            step, batch=options.batch, seq_len=options.seq_len, seed=options.seed
        )
        text = place(text, self.setup.by_batch)
        self.state, loss, stats = self.step(self.state, text)
        return float(loss), jax.device_get(stats)

    def held_out_loss(self) -> float:
        """Nats per byte of the held-out text."""
        losses = [
            self.held_out_step(self.state.params, place(text, self.setup.by_batch))
            for text in self.held_out
        ]
        return float(np.mean(jax.device_get(losses)))

    def _describe(self, first: int) -> str:
        options, group = self.options, self.setup.group
        platform = group.mesh.devices.flat[0].platform
        size = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        where = (
            "1 device, dense"
            if options.dense
            else (
                f"mesh data {options.mesh[0]} x expert {options.mesh[1]} of {platform}, backend "
                f"{group.backend}"
            )
        )
        start = f", from step {first}" if first else ""
        text = f"{len(self.corpus.training) / 1e6:.1f} MB of text"
        return f"{size / 1e6:.2f} M parameters ({options.flavor}), {where}, {text}{start}"

    def _report(self, metrics: Metrics) -> None:
        options = self.options
        if _is_first():
            plot_losses(options.out / "loss.png", metrics, self.unigram)
        if _is_first() and metrics.steps:
            plot_expert_load(options.out / "expert_load.png", metrics)
        if options.sample_bytes:
            writer = Writer(options, self.setup.model, self.state.params)
            written = writer.write(
                np.frombuffer(PROMPT, np.uint8)[None],
                num_bytes=options.sample_bytes,
                temperature=TEMPERATURE,
                seed=options.seed,
            )
            text = printable(PROMPT + written.text.tobytes())
            print(f"\nA sample that the model wrote:\n{'-' * 72}\n{text}\n{'-' * 72}")
        held_out = metrics.last_held_out
        print(f"held-out loss    {held_out:.4f} nats per byte")
        print(f"unigram entropy  {self.unigram:.4f} nats per byte of the same text")
        print(f"below it by      {self.unigram - held_out:.4f} nats")
        print(f"written to       {options.out}: loss.png, expert_load.png, metrics.jsonl")


def _is_first() -> bool:
    """Whether this is the process that writes what is not of all."""
    return jax.process_index() == 0


def _is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
