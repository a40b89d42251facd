# SPDX-License-Identifier: Apache-2.0
"""Continues a text with a trained model, and reports how fast it was written."""

import sys

import numpy as np

import jax_ep
from moe_lm.build import Setup, build
from moe_lm.checkpoints import Checkpoints
from moe_lm.generation import Writer, Written, printable
from moe_lm.options import Options
from moe_lm.training import initial_state, make_optimizer


def serve(
    options: Options,
    *,
    prompt: str,
    copies: int,
    num_bytes: int,
    temperature: float,
    sample_seed: int,
    prefill_chunk: int | None,
) -> int:
    """Writes, and prints; returns the exit status of the program."""
    try:
        setup = build(options)
    except (ValueError, jax_ep.EpUnavailable) as error:
        return _fail(error)
    with setup.group:
        try:
            writer = _restored(options, setup)
            prompts = _prompts(prompt, copies, prefill_chunk, options)
        except ValueError as error:
            return _fail(error)

        def write() -> Written:
            return writer.write(
                prompts,
                num_bytes=num_bytes,
                temperature=temperature,
                seed=sample_seed,
                chunk=prefill_chunk,
            )

        write()  # compiles
        written = write()
    for text in written.text:
        print(f"{'-' * 72}\n{printable(prompt.encode() + text.tobytes())}")
    print("-" * 72)
    _report(written)
    return 0


def _fail(error: Exception) -> int:
    print(f"generate.py: error: {error}", file=sys.stderr)
    return 2


def _prompts(prompt: str, copies: int, chunk: int | None, options: Options) -> np.ndarray:
    prompts = np.tile(np.frombuffer(prompt.encode(), np.uint8), (copies, 1))
    at_once = copies * min(prompts.shape[1], chunk or prompts.shape[1])
    per_device = -(-at_once // options.num_devices)
    most = options.batch * options.seq_len // options.num_devices
    if per_device > most:
        raise ValueError(
            f"argument --prompt: {per_device} bytes on each device at once, over all copies; "
            f"allowed: up to {most}, which is --batch times --seq-len over the devices; or a "
            "smaller --prefill-chunk"
        )
    return prompts


def _restored(options: Options, setup: Setup) -> Writer:
    folder = options.out / "checkpoints"
    state = initial_state(options, setup, make_optimizer(options))
    step = 0
    if folder.is_dir():
        with Checkpoints(folder, options.identity) as checkpoints:
            step, state = checkpoints.restore(state)
    if step == 0:
        raise ValueError(
            f"argument --out: {options.out} has no checkpoint; train_moe_lm.py writes some"
        )
    return Writer(options, setup.model, state.params)


def _report(written: Written) -> None:
    total = written.first_s + sum(written.next_s)
    print(f"bytes per second     {written.text.size / total:.1f}")
    print(f"time to first byte   {written.first_s * 1e3:.2f} ms")
    if written.next_s:
        shares = np.percentile(np.array(written.next_s) * 1e3, (50, 90, 99))
        median, tenth, hundredth = (f"{share:.2f}" for share in shares)
        print(f"between bytes        {median} ms (90 %: {tenth}, 99 %: {hundredth})")
