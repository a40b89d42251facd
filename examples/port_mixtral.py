# SPDX-License-Identifier: Apache-2.0
"""A Mixtral checkpoint, as Hugging Face has it, in a model whose experts are spread over devices.

    python examples/port_mixtral.py [--steps 20]

A tiny checkpoint with random weights is written, in the format and with the names that Mixtral has
there. A small NNX model reads it, its MoE blocks being `jax_ep.flax.nnx.MoE`, on eight devices (JAX
makes them of the CPU here). Its logits are compared with those of a dense model in NumPy; then it
is trained for some steps, and writes tokens with a KV cache. Each part checks itself.
"""

import argparse
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    count = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()

# JAX reads the environment when it is imported.
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
import jax_ep.flax.nnx
from jax_ep.flax import load_experts

Tensors = Callable[[str], np.ndarray]
Cache = list[tuple[jax.Array, jax.Array]]
DEVICES = ("data", "expert")
BATCH, SEQ, PROMPT = 16, 32, 8


@dataclasses.dataclass(frozen=True)
class Config:
    """The names of Hugging Face's config.json."""

    vocab_size: int = 64
    hidden_size: int = 64
    intermediate_size: int = 96
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    rope_theta: float = 1e4
    rms_norm_eps: float = 1e-5
    router_aux_loss_coef: float = 0.02

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads


# --- the checkpoint ------------------------------------------------------------------------------


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """All tensors of a Mixtral; matrices are `[out, in]`, as in `torch.nn.Linear`."""
    hidden, kv = c.hidden_size, c.num_key_value_heads * c.head_dim
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, hidden)}
    for layer in range(c.num_hidden_layers):
        own = f"model.layers.{layer}"
        found[f"{own}.input_layernorm.weight"] = (hidden,)
        for name, size in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            found[f"{own}.self_attn.{name}_proj.weight"] = (size, hidden)
        found[f"{own}.post_attention_layernorm.weight"] = (hidden,)
        found[f"{own}.block_sparse_moe.gate.weight"] = (c.num_local_experts, hidden)
        for expert in range(c.num_local_experts):
            of_expert = f"{own}.block_sparse_moe.experts.{expert}"
            found[f"{of_expert}.w1.weight"] = (c.intermediate_size, hidden)  # gate
            found[f"{of_expert}.w2.weight"] = (hidden, c.intermediate_size)  # down
            found[f"{of_expert}.w3.weight"] = (c.intermediate_size, hidden)  # up
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (c.vocab_size, hidden)}


def write_checkpoint(c: Config, path: pathlib.Path) -> None:
    """Random weights of usual sizes."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes(c).items():
        values = rng.normal(size=shape)
        values = 1 + 0.1 * values if len(shape) == 1 else values / shape[-1] ** 0.5
        tensors[name] = values.astype(np.float32)
    safetensors.numpy.save_file(tensors, path)


# --- the model -----------------------------------------------------------------------------------


class Attention(nnx.Module):
    """Causal attention with rotary positions, where several heads share keys and values."""

    def __init__(self, c: Config, matrix: Callable[[str], nnx.Param]) -> None:
        self.c = c
        self.q, self.k, self.v, self.o = (matrix(f"{name}_proj") for name in "qkvo")

    def __call__(
        self, x: jax.Array, start: jax.Array, cache: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Positions from `start` on are new; a cache `[B, N, heads, D]` has those before."""
        split = (*x.shape[:2], -1, self.c.head_dim)
        q, k, v = ((x @ w[...]).reshape(split) for w in (self.q, self.k, self.v))
        positions = start + jnp.arange(x.shape[1])
        q, k = (rotate(a, positions, self.c.rope_theta) for a in (q, k))
        if cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice(old, new, (0, start, 0, 0))
                for old, new in zip(cache, (k, v), strict=True)
            )
        seen = jnp.arange(k.shape[1])[None, :] <= positions[:, None]
        out = jax.nn.dot_product_attention(q, k, v, mask=seen[None, None])
        return out.reshape(x.shape) @ self.o[...], (k, v)


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) of `[B, S, heads, D]`."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** -(jnp.arange(half, dtype=jnp.float32) / half)[None, :]
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def norm(x: jax.Array, weight: nnx.Param, eps: float) -> jax.Array:
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * weight[...]


class Block(nnx.Module):
    """One layer: attention, and the experts that every token selects."""

    def __init__(self, c: Config, group: jax_ep.EpGroup, tensors: Tensors, name: str) -> None:
        self.eps = c.rms_norm_eps
        self.before_attention = dense(group, tensors(f"{name}.input_layernorm.weight"))
        self.before_moe = dense(group, tensors(f"{name}.post_attention_layernorm.weight"))
        self.attention = Attention(
            c, lambda own: dense(group, tensors(f"{name}.self_attn.{own}.weight").T)
        )
        self.moe = jax_ep.flax.nnx.MoE(group, c.intermediate_size, rngs=nnx.Rngs(0))

        def of_experts(own: str) -> list[Callable[[], np.ndarray]]:
            """Functions, so that a process reads the experts of its own devices only."""
            names = (
                f"{name}.block_sparse_moe.experts.{expert}.{own}.weight"
                for expert in range(c.num_local_experts)
            )
            return [lambda name=name: tensors(name) for name in names]

        load_experts(
            self.moe,
            layout="torch",
            gate=of_experts("w1"),
            up=of_experts("w3"),
            down=of_experts("w2"),
            router=tensors(f"{name}.block_sparse_moe.gate.weight"),
        )

    def __call__(
        self, x: jax.Array, start: jax.Array, cache: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """As `Attention`."""
        mixed, cache = self.attention(norm(x, self.before_attention, self.eps), start, cache)
        x = x + mixed
        return x + self.moe(norm(x, self.before_moe, self.eps)), cache


def dense(group: jax_ep.EpGroup, values: np.ndarray) -> nnx.Param:
    """A parameter that all devices have, on the mesh of the group like the layer's own."""
    return nnx.Param(jax.device_put(values, NamedSharding(group.mesh, P())))


class Mixtral(nnx.Module):
    """The whole model, from a checkpoint."""

    def __init__(self, c: Config, group: jax_ep.EpGroup, tensors: Tensors) -> None:
        self.c = c
        self.embed = dense(group, tensors("model.embed_tokens.weight"))
        names = [f"model.layers.{layer}" for layer in range(c.num_hidden_layers)]
        self.blocks = nnx.List([Block(c, group, tensors, name) for name in names])
        self.norm = dense(group, tensors("model.norm.weight"))
        self.head = dense(group, tensors("lm_head.weight").T)

    def __call__(
        self, tokens: jax.Array, start: int | jax.Array = 0, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache]:
        """Logits `[B, S, vocabulary]`, and the keys and values of each layer."""
        x, kept = self.embed[...][tokens], []
        for i, block in enumerate(self.blocks):
            x, own = block(x, jnp.asarray(start), None if cache is None else cache[i])
            kept.append(own)
        return norm(x, self.norm, self.c.rms_norm_eps) @ self.head[...], kept


# --- the same in NumPy, dense --------------------------------------------------------------------


def dense_logits(c: Config, tensors: Tensors, tokens: np.ndarray) -> np.ndarray:
    """Straight from the checkpoint, in float64, every expert for every token that selected it."""

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ tensors(f"{name}.weight").astype(np.float64).T

    def rms_norm(x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt((x**2).mean(axis=-1, keepdims=True) + c.rms_norm_eps)
        return x / scale * tensors(f"{name}.weight")

    x = tensors("model.embed_tokens.weight")[tokens].astype(np.float64)
    for layer in range(c.num_hidden_layers):
        own = f"model.layers.{layer}"
        y = rms_norm(x, f"{own}.input_layernorm")
        q, k, v = (linear(y, f"{own}.self_attn.{n}_proj") for n in "qkv")
        x = x + linear(dense_attention(c, q, k, v), f"{own}.self_attn.o_proj")
        y = rms_norm(x, f"{own}.post_attention_layernorm")
        x = x + dense_moe(
            c, y, lambda a, name, own=own: linear(a, f"{own}.block_sparse_moe.{name}")
        )
    return linear(rms_norm(x, "model.norm"), "lm_head")


def dense_attention(c: Config, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Head by head; complex numbers turn by angles that grow with the position."""
    half, length = c.head_dim // 2, q.shape[1]
    angles = np.outer(np.arange(length), c.rope_theta ** -(np.arange(half) / half))

    def head_of(a: np.ndarray, head: int, *, turn: bool) -> np.ndarray:
        a = a[..., head * c.head_dim : (head + 1) * c.head_dim]
        if not turn:
            return a
        turned = (a[..., :half] + 1j * a[..., half:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    out = []
    for head in range(c.num_attention_heads):
        kv_head = head * c.num_key_value_heads // c.num_attention_heads
        query, key = head_of(q, head, turn=True), head_of(k, kv_head, turn=True)
        scores = query @ key.swapaxes(1, 2) / c.head_dim**0.5
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = scores / scores.sum(axis=-1, keepdims=True)
        out.append(weights @ head_of(v, kv_head, turn=False))
    return np.concatenate(out, axis=-1)


def dense_moe(
    c: Config, x: np.ndarray, linear: Callable[[np.ndarray, str], np.ndarray]
) -> np.ndarray:
    """Mixtral's definition: a softmax over the logits of the experts that were chosen."""
    logits = linear(x, "gate")
    last = np.sort(logits, axis=-1)[..., -c.num_experts_per_tok, None]
    scores = np.where(logits >= last, np.exp(logits), 0)
    scores /= scores.sum(axis=-1, keepdims=True)
    out = np.zeros_like(x)
    for expert in range(c.num_local_experts):
        gate = linear(x, f"experts.{expert}.w1")
        up = linear(x, f"experts.{expert}.w3")
        y = linear(gate / (1 + np.exp(-gate)) * up, f"experts.{expert}.w2")
        out += scores[..., expert, None] * y
    return out


# --- what is done with it ------------------------------------------------------------------------


def sequences(c: Config, seed: int, length: int) -> np.ndarray:
    """Tokens `[BATCH, length]` that count up by 1, 2 or 3."""
    rng = np.random.default_rng(seed)
    first, step = rng.integers(c.vocab_size, size=(BATCH, 1)), rng.integers(1, 4, size=(BATCH, 1))
    return (first + step * np.arange(length)) % c.vocab_size


def compare(c: Config, model: Mixtral, tensors: Tensors, tokens: jax.Array) -> None:
    """Checks the logits."""
    logits, _ = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    want = dense_logits(c, tensors, np.asarray(tokens))
    difference = np.abs(np.asarray(logits) - want).max()
    print(f"logits {logits.shape}, largest {np.abs(want).max():.2f}: they differ from those of a")
    print(f"dense model in NumPy by at most {difference:.1e}")
    assert difference <= 1e-4


@nnx.jit
def train_step(model: Mixtral, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    """One step; returns the cross-entropy per token."""

    def objective(model: Mixtral) -> tuple[jax.Array, jax.Array]:
        logits, _ = model(tokens[:, :-1])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
        balance = sum(block.moe.load_balance_loss.get_value() for block in model.blocks)
        # Hugging Face's loss is K times ours: a coefficient from a config is for that.
        scale = model.c.router_aux_loss_coef * model.c.num_experts_per_tok / len(model.blocks)
        return loss + scale * balance, loss

    (_, loss), grads = nnx.value_and_grad(objective, has_aux=True)(model)
    optimizer.update(model, grads)
    return loss


def train(c: Config, model: Mixtral, steps: int, put: Callable[[np.ndarray], jax.Array]) -> None:
    """Checks that the loss goes down."""
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    losses = []
    for step in range(steps):
        losses.append(float(train_step(model, optimizer, put(sequences(c, step, SEQ + 1)))))
        if step % 5 == 0 or step == steps - 1:
            load = model.blocks[0].moe.tokens_per_expert.get_value()
            print(f"step {step + 1:3} | loss {losses[-1]:.3f} | tokens per expert {load.tolist()}")
    assert steps < 2 or losses[-1] < losses[0], losses


@nnx.jit
def next_tokens(
    model: Mixtral, tokens: jax.Array, start: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """The likeliest token after the last one of each sequence."""
    logits, cache = model(tokens, start, cache)
    return jnp.argmax(logits[:, -1:], axis=-1), cache


def write(c: Config, model: Mixtral, prompt: jax.Array, num_tokens: int) -> None:
    """Checks that tokens are those of the model without a cache.

    The group serves the prompts, steps of one token for each sequence, and training alike: the room
    for received rows follows the tokens of a call.
    """
    shape = (BATCH, PROMPT + num_tokens, c.num_key_value_heads, c.head_dim)
    empty = jax.device_put(jnp.zeros(shape), NamedSharding(prompt.sharding.mesh, P(DEVICES)))
    cache, tokens, start = [(empty, empty)] * c.num_hidden_layers, prompt, 0
    written = [np.asarray(prompt)]
    for _ in range(num_tokens):
        tokens, cache = next_tokens(model, tokens, jnp.asarray(start), cache)
        start += written[-1].shape[1]
        written.append(np.asarray(tokens))
    whole = np.concatenate(written, axis=1)
    for row in whole[:3]:
        print(f"wrote {row[:PROMPT].tolist()} -> {row[PROMPT:].tolist()}")
    logits, _ = nnx.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(whole[:, :-1]))
    likeliest = np.asarray(jnp.argmax(logits, axis=-1))
    np.testing.assert_array_equal(whole[:, PROMPT:], likeliest[:, PROMPT - 1 :])
    print("the same tokens as without a cache")


def main() -> None:
    """Runs all parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="of training (default: 20)")
    steps = parser.parse_args().steps
    c = Config()
    mesh = jax.make_mesh((2, 4), DEVICES, axis_types=(AxisType.Auto,) * 2)
    config = jax_ep.EpConfig(
        num_experts=c.num_local_experts,
        num_topk=c.num_experts_per_tok,
        hidden=c.hidden_size,
        max_tokens_per_rank=BATCH * SEQ // mesh.size,
        dtype=jnp.float32,
    )

    def put(tokens: np.ndarray) -> jax.Array:
        """Sequences are spread over all devices, those that share experts too."""
        return jax.device_put(tokens.astype(np.int32), NamedSharding(mesh, P(DEVICES)))

    with tempfile.TemporaryDirectory() as folder, jax_ep.EpGroup(mesh, "expert", config) as group:
        path = pathlib.Path(folder) / "model.safetensors"
        write_checkpoint(c, path)
        # Under the mesh, what JAX makes along the way is on it, too.
        with safetensors.safe_open(path, "numpy") as file, jax.set_mesh(mesh):
            model = Mixtral(c, group, file.get_tensor)
            print(f"{len(shapes(c))} tensors read; a device has", end=" ")
            w_gate = model.blocks[0].moe.w_gate.get_value()
            print(f"{w_gate.sharding.shard_shape(w_gate.shape)[0]} of {w_gate.shape[0]} experts")
            compare(c, model, file.get_tensor, put(sequences(c, 0, SEQ)))
            train(c, model, steps, put)
            write(c, model, put(sequences(c, 1000, PROMPT)), 8)
    print("All checks passed.")


if __name__ == "__main__":
    main()
