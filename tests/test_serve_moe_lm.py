# SPDX-License-Identifier: Apache-2.0
"""The example server's model writes what the training example writes, whoever else is served."""

import asyncio
import contextlib

import jax
import numpy as np
import pytest

from ep_testing.hlo import collectives, operands
from moe_lm.build import build
from moe_lm.generation import Writer, _pick
from moe_serve.loading import model_and_experts
from moe_serve.options import parse
from moe_serve.plans import Request
from moe_serve.sampling import Sampling, sample
from moe_serve.scheduler import Scheduler
from moe_serve.served import make_engine
from moe_serve.telemetry import Telemetry

pytestmark = pytest.mark.example

# Longer than the window of 32 bytes, and than a row of 8.
LENGTH, NUM_BYTES, WIDTHS, MAX_LEN = 13, 40, (8,), 96
LAYERS, NUM_EXPERTS, SLOTS = 1, 8, 2


class Example:
    """A model with parameters that nobody has trained, and what the training example writes."""

    def __init__(self, stack: contextlib.ExitStack, *options: str, layers: int = LAYERS) -> None:
        self.serve, self.options = parse(
            [
                *("--layers", str(layers), "--hidden", "32", "--heads", "2", "--ffn", "32"),
                *("--experts", str(NUM_EXPERTS), "--seq-len", "32", "--batch", "8"),
                *("--slots", str(SLOTS), "--widths", "8", "--max-len", str(MAX_LEN)),
                *options,
            ]
        )
        setup = build(self.options)
        stack.enter_context(setup.group)
        self.num_ranks = setup.group.num_ranks
        params = setup.model.init(self.options.seed)
        self.telemetry = Telemetry()
        self.model, self.experts = model_and_experts(
            self.serve, self.options, setup.group, params, self.telemetry, stack
        )
        rng = np.random.default_rng(0)
        self.prompts = rng.integers(0, 256, (8, LENGTH)).astype(np.uint8)
        writer = Writer(self.options, setup.model, params)
        written = writer.write(self.prompts, num_bytes=NUM_BYTES)
        self.texts = [text.tobytes() for text in written.text]

    def request(self, number: int, **options) -> Request:
        options = {"max_tokens": NUM_BYTES, **options}
        return Request(id=number, prompt=self.prompts[number].tobytes(), **options)

    def scheduler(self, budget: int = 24) -> Scheduler:
        return Scheduler(
            num_devices=self.model.num_devices,
            slots_per_device=SLOTS,
            max_len=MAX_LEN,
            widths=WIDTHS,
            max_prefill_tokens=budget,
        )

    def write(self, requests, *, alive=None, budget=24) -> dict[int, bytes]:
        """Steps until all is written."""
        scheduler = self.scheduler(budget)
        scheduler.set_alive(
            (alive or [True] * self.num_ranks) * (self.model.num_devices // self.num_ranks)
        )
        texts = {request.id: bytearray() for request in requests}
        for request in requests:
            scheduler.add(request)
        while not scheduler.is_idle:
            step(self.model, scheduler, texts)
        return {i: bytes(text) for i, text in texts.items()}


def step(model, scheduler, texts) -> None:
    plan = scheduler.plan()
    written = []
    if plan.prefill:
        written += model.step(plan.prefill, plan.width)
    if plan.decode:
        written += model.step(plan.decode, 1)
    rows = (*plan.prefill, *plan.decode)
    for event in scheduler.commit(rows, [w.token for w in written]):
        texts[event.request_id].append(event.token)


@pytest.fixture(scope="module")
def example():
    with contextlib.ExitStack() as stack:
        yield Example(stack, "--mesh", "2x2")


@pytest.fixture(autouse=True)
def _all_experts(request):
    yield
    if "example" in request.fixturenames:
        model = request.getfixturevalue("example").model
        model.set_experts(np.ones((LAYERS, NUM_EXPERTS), bool))


def test_text_is_that_of_the_training_example_in_any_order(example):
    assert len(set(example.texts)) == 8
    numbers = np.random.default_rng(1).permutation(8).tolist()
    for order, budget in (([*range(8)], 24), (numbers, 9), ([5], 24)):
        texts = example.write([example.request(i) for i in order], budget=budget)
        assert texts == {i: example.texts[i] for i in order}


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_neighbors(example):
    drawn = {"temperature": 1.0, "max_tokens": 20}
    several = example.write([example.request(i, seed=i % 3, **drawn) for i in range(8)])
    for i in (0, 5):
        assert example.write([example.request(i, seed=i % 3, **drawn)])[i] == several[i]
        assert several[i] != example.texts[i][:20]
    other = example.write([example.request(0, seed=7, **drawn)])
    assert other[0] != several[0]


def test_a_step_that_is_thrown_away_changes_nothing(example):
    scheduler, texts = example.scheduler(), {i: bytearray() for i in range(3)}
    for i in texts:
        scheduler.add(example.request(i))
    number = 0
    while not scheduler.is_idle:
        if number % 2:
            plan = scheduler.plan()
            example.model.step(plan.prefill, plan.width or WIDTHS[0])
            example.model.step(plan.decode, 1)
        step(example.model, scheduler, texts)
        number += 1
    assert {i: bytes(text) for i, text in texts.items()} == {i: example.texts[i] for i in texts}


def test_a_rank_that_leaves_takes_no_stream_along(example):
    engine = make_engine(
        example.serve, example.options, example.model, example.experts, example.telemetry
    )

    async def read(number: int) -> bytes:
        stream, text = engine.open(example.request(number)), bytearray()
        async for token in stream:
            text.append(token.byte)
            lengths[number] = len(text)
        stream.close()
        return bytes(text)

    async def run():
        tasks = [asyncio.ensure_future(read(number)) for number in range(8)]
        while min(lengths) < 5:
            await asyncio.sleep(0.001)
        await engine.set_alive(1, False)
        left = list(lengths)  # at least so many are of all ranks
        return left, await asyncio.gather(*tasks)

    lengths = [0] * 8
    engine.start()
    try:
        left, texts = asyncio.run(run())
    finally:
        engine.close()
    assert engine.telemetry.counters["moved"] == 4
    # What came before is what it would have been; what comes after is of fewer experts.
    assert all(t[:n] == want[:n] for t, n, want in zip(texts, left, example.texts, strict=True))
    assert sum(text != want for text, want in zip(texts, example.texts, strict=True)) >= 4
    # Those who had to move have read everything again, so they go on as a new request would.
    has_expert = np.arange(NUM_EXPERTS) < 4
    example.model.set_experts(np.stack([has_expert] * LAYERS))
    num_found = 0
    for number, text in enumerate(texts):
        matches = [
            at
            for at in range(left[number], left[number] + 3)
            if at < NUM_BYTES and _goes_on(example, number, text, at)
        ]
        num_found += bool(matches)
    assert num_found >= 4
    # Nobody of the rank serves anything any more.
    example.model.take_counts()
    example.write([example.request(0, max_tokens=3)], alive=[True, False])
    counts = example.model.take_counts()
    assert counts[:, :4].sum() == LAYERS * 2 * (LENGTH + 2)
    assert counts[:, 4:].sum() == 0


def _goes_on(example, number: int, text: bytes, at: int) -> bool:
    """Whether a new request with the prompt and `at` bytes of the text has the rest of it."""
    prompt = example.prompts[number].tobytes() + text[:at]
    request = Request(id=0, prompt=prompt, max_tokens=NUM_BYTES - at)
    return example.write([request], alive=[True, False])[0] == text[at:]


def test_the_program_has_no_collective_of_xla(example):
    model = example.model
    for width in (1, *WIDTHS):
        rows, sampling, _ = model._batch([], width)
        state = (model._params, model._rest, model._caches)
        masks = (model._has_expert, model._alive)
        text = model._step.lower(*state, rows, sampling, *masks).compile().as_text()
        # With the mask of ranks: nobody waits for one that has left.
        assert operands(text) == {"dispatch_start": 6, "dispatch_done": 3, "combine": 7}
        assert not collectives(text)


# --- copies of experts ---------------------------------------------------------------------------


def _has_weights_of_its_experts(placed, layer: int) -> bool:
    placement = placed.experts._in_use[layer]
    weights = placed.model.weights(layer)
    return all(
        np.array_equal(weight[slot], placed.experts._weights[layer][name][expert])
        for name, weight in weights.items()
        for slot, expert in enumerate(placement.slot_expert[layer])
        if expert >= 0
    )


@pytest.fixture(scope="module")
def placed():
    with contextlib.ExitStack() as stack:
        yield Example(stack, "--mesh", "1x4", "--spare-slots", "1", layers=2)


def _write_all(placed, alive=None) -> list[bytes]:
    texts = placed.write([placed.request(i) for i in range(8)], alive=alive)
    return [texts[i] for i in range(8)]


def _settle(placed) -> None:
    """A layer changes at a step."""
    for _ in range(2):
        placed.experts.observe(steps=1)


def _num_copies(placed) -> np.ndarray:
    """`[layers, E]`."""
    in_use = enumerate(placed.experts._in_use)
    return np.stack([(placement.copies[i] >= 0).sum(axis=1) for i, placement in in_use])


def test_copies_follow_loads(placed):
    model, experts = placed.model, placed.experts
    assert _write_all(placed) == placed.texts
    programs = model._step._cache_size()
    # Loads are those of the experts, whatever slots they are in.
    experts._take_loads()
    reads = LENGTH + NUM_BYTES - 1
    assert (experts._of_experts.sum(axis=1) == 8 * reads * 2).all()
    assert (experts._of_ranks.sum(axis=1) == 8 * reads * 2).all()

    # One expert becomes popular.
    experts._of_experts[:] = [[100] * 7 + [2000]] * 2
    assert experts.decide() == "move"
    assert len(placed.telemetry.loads) == 1
    _settle(placed)
    placement = experts._in_use[1]
    assert ((placement.copies[:, 7] >= 0).sum(axis=1) > 1).all()
    assert placed.telemetry.counters["moved_slots"] > 0
    assert all(_has_weights_of_its_experts(placed, layer) for layer in range(2))
    assert _write_all(placed) == placed.texts
    assert model._step._cache_size() == programs, "something was compiled again"


def test_experts_of_a_rank_that_leaves_come_from_the_host(placed):
    model, experts, alive = placed.model, placed.experts, [False, True, True, True]
    _write_all(placed)
    programs = model._step._cache_size()
    alone = experts._in_use[0].lost(alive)[0]
    assert alone.any()
    # Expert 3 is popular, and nobody has looked yet.
    model.counts[[0, 1], [p.copies[i, 3, 0] for i, p in enumerate(experts._in_use)]] += 50_000
    experts.set_alive(alive)
    assert (model._has_expert[0] == ~alone).all()
    model.take_counts()
    placed.write([placed.request(0, max_tokens=4)], alive=alive)
    assert model.counts[:, :3].sum() == 0
    _settle(placed)
    assert _num_copies(placed)[:, 3].tolist() == [2, 2]  # the one slot that is left
    assert model._has_expert.all()
    assert all(_has_weights_of_its_experts(placed, layer) for layer in range(2))
    assert _write_all(placed, alive) == placed.texts
    assert model.take_counts()[:, :3].sum() == 0

    # Another one: three slots each are not enough for all.
    alive = [False, True, True, False]
    experts.set_alive(alive)
    _settle(placed)
    assert 2 <= model._has_expert.sum(axis=1).min() <= 6
    placed.write([placed.request(0, max_tokens=4)], alive=alive)
    assert model.take_counts().reshape(2, 4, 3)[:, [0, 3]].sum() == 0
    # However uneven the loads are, no plan has room; nor for the rank that comes back.
    popular = experts._in_use[0].copies[:, :, 0] // 3 == 1
    experts._of_experts[:] = np.where(popular, 1000, 10)
    assert experts.decide() != "move"
    _settle(placed)
    placed.write([placed.request(0, max_tokens=4)], alive=alive)
    experts.set_alive([True] * 4)
    _settle(placed)
    assert (_num_copies(placed)[popular] > 1).all()  # by the window that has ended
    assert all(_has_weights_of_its_experts(placed, layer) for layer in range(2))
    assert _write_all(placed) == placed.texts
    assert model._step._cache_size() == programs, "something was compiled again"


# --- sampling ------------------------------------------------------------------------------------


def _sampling(shape, **options) -> Sampling:
    values = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0} | options
    dtypes = {"temperature": "float32", "top_k": "int32", "top_p": "float32", "seed": "int32"}
    return Sampling(**{n: np.full(shape, v, dtypes[n]) for n, v in values.items()})


def test_bytes_are_drawn_as_the_training_example_draws_them():
    logits = np.random.default_rng(0).standard_normal((1, 256)).astype(np.float32)
    draw = jax.jit(sample)
    for position in range(20):
        at = np.full((1, 1), position, np.int32)
        token, logprob = draw(logits[None], at, _sampling((1, 1), temperature=0.7, seed=3))
        key = jax.random.key(3)
        assert token[0, 0] == _pick(logits, key=key, position=position, temperature=0.7)[0]
        want = logits[0] - np.log(np.exp(logits[0]).sum())
        np.testing.assert_allclose(logprob[0, 0], want[token[0, 0]], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 1}, 1),
        ({"top_k": 3}, 3),
        ({"top_p": 0.69}, 3),  # 0.4 + 0.2 are less, with 0.1 it is enough
        ({"top_p": 0.59}, 2),
        ({"top_p": 0.01}, 1),
        ({"top_k": 2, "top_p": 0.69}, 2),
        ({}, 256),
    ],
)
def test_only_the_likeliest_are_drawn_as_often_as_they_are_likely(options, allowed):
    probabilities = np.full(256, 0.3 / 253)
    probabilities[[7, 9, 11]] = 0.4, 0.2, 0.1
    shape = (1, 4000)
    logits = np.broadcast_to(np.log(probabilities).astype(np.float32), (*shape, 256))
    position = np.arange(4000, dtype=np.int32)[None]
    token, _ = jax.jit(sample)(logits, position, _sampling(shape, temperature=1.0, **options))
    falling = np.argsort(-probabilities, kind="stable")[:allowed]
    want = np.zeros(256)
    want[falling] = probabilities[falling] / probabilities[falling].sum()
    share = np.bincount(np.asarray(token)[0], minlength=256) / 4000
    assert not share[want == 0].any()
    # Five standard deviations of the share of 4000 that are drawn.
    assert (abs(share - want) <= 5 * np.sqrt(want * (1 - want) / 4000)).all()
