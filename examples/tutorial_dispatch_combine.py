# SPDX-License-Identifier: Apache-2.0
"""A tour of `dispatch` and `combine`, by hand inside `jax.shard_map`.

    python examples/tutorial_dispatch_combine.py

Eight devices (JAX makes them of the CPU here) are the eight ranks of one EP group. Each holds three
tokens and two of sixteen experts. Every step prints what it shows, and checks it.
"""

import functools
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    count = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()

# JAX reads the environment when it is imported.
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_ep

RANKS, TOKENS, HIDDEN, EXPERTS, TOPK = 8, 3, 4, 16, 2
LOCAL_EXPERTS = EXPERTS // RANKS


def main() -> None:
    """Runs all steps."""
    # --- 1. A group ---------------------------------------------------------------------------
    # The config says how large things are, the group who takes part: all ranks along one axis of
    # a mesh. Expert e lives on rank e // LOCAL_EXPERTS.
    mesh = jax.make_mesh((RANKS,), ("expert",), axis_types=(AxisType.Auto,))
    config = jax_ep.EpConfig(
        num_experts=EXPERTS,
        num_topk=TOPK,
        hidden=HIDDEN,
        max_tokens_per_rank=TOKENS,
        dtype=jnp.float32,
    )
    with jax_ep.EpGroup(mesh, "expert", config) as group:
        room = config.capacity(num_ranks=RANKS, num_tokens=TOKENS)
        print(f"1. {group.num_ranks} ranks, backend {group.backend}, receive buffers of")
        print(f"   {room} rows: enough for every routing, so nothing is dropped.\n")
        x, topk_idx, topk_weights = make_tokens()
        there_and_back(group, x, topk_idx, topk_weights)
        experts_and_gradients(group, x, topk_idx, topk_weights)
    with jax_ep.EpGroup(mesh, "expert", config.with_capacity_factor(1.0)) as small_group:
        too_little_room(small_group, x, topk_idx)
    print("All checks passed.")


def make_tokens() -> tuple[jax.Array, jax.Array, jax.Array]:
    """The tokens of all ranks, `[RANKS * TOKENS, ...]`, and where they go."""
    # A token's values say whose it is: rank 2's token 1 is [2.1, 2.1, 2.1, 2.1].
    rank, token = np.divmod(np.arange(RANKS * TOKENS), TOKENS)
    x = jnp.asarray((rank + token / 10)[:, None].repeat(HIDDEN, 1), jnp.float32)
    # A router would compute logits from the tokens; here they are random.
    logits = jax.random.normal(jax.random.key(0), (RANKS * TOKENS, EXPERTS))
    topk_idx, topk_weights = jax_ep.route(logits, num_topk=TOPK)
    # -1 means "no selection": token 0 of rank 0 goes to one expert only, token 1 to none.
    topk_idx = topk_idx.at[0, 1].set(-1).at[1, :].set(-1)
    return x, topk_idx, topk_weights


def there_and_back(
    group: jax_ep.EpGroup, x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array
) -> None:
    """Step 2: what arrives, and in which order."""

    # Inside shard_map every array is one rank's part: x is [TOKENS, HIDDEN] there.
    def on_rank(x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array) -> tuple:
        recv = jax_ep.dispatch(x, topk_idx, topk_weights, group=group)
        # The experts would work on recv.x here. Without them, combine returns every token times
        # the sum of its weights. The handle remembers where each row came from.
        back = jax_ep.combine(recv.x, recv.handle, recv.weights, group=group)
        return recv.x, recv.group_sizes, back

    rows, group_sizes, back = jax.jit(
        jax.shard_map(on_rank, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert"))
    )(x, topk_idx, topk_weights)

    # Rows are sorted by (local expert, source rank, source token), and group_sizes says how many
    # each expert has, which is what jax.lax.ragged_dot wants to know.
    rows = np.asarray(rows).reshape(RANKS, -1, HIDDEN)
    group_sizes = np.asarray(group_sizes).reshape(RANKS, LOCAL_EXPERTS)
    print("2. What each rank received (a token 2.1 is rank 2's token 1):")
    for rank in range(RANKS):
        start = 0
        for local, size in enumerate(group_sizes[rank]):
            expert = rank * LOCAL_EXPERTS + local
            tokens = rows[rank, start : start + size, 0]
            print(f"   rank {rank}, expert {expert:2}: {[round(float(t), 1) for t in tokens]}")
            wanted = np.asarray(x)[(np.asarray(topk_idx) == expert).any(axis=1), 0]
            np.testing.assert_array_equal(tokens, wanted)
            start += size

    weight_sums = np.where(topk_idx >= 0, topk_weights, 0).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(back, x * weight_sums, rtol=1e-6)
    print("   Combine brought them back: token 1 of rank 0 selected nothing and got", end=" ")
    print(f"{np.asarray(back)[1].tolist()}.\n")


def experts_and_gradients(
    group: jax_ep.EpGroup, x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array
) -> None:
    """Step 3: experts between dispatch and combine, and gradients through all of it."""
    w = jax.random.normal(jax.random.key(1), (EXPERTS, HIDDEN, HIDDEN)) / HIDDEN**0.5

    def on_rank(
        w: jax.Array, x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array
    ) -> jax.Array:
        recv = jax_ep.dispatch(x, topk_idx, topk_weights, group=group)
        # Rows [0, size 0) times w[0], the next [0, size 1) times w[1]: this rank's experts.
        y = jax.lax.ragged_dot(recv.x, w, recv.group_sizes)
        return jax_ep.combine(y, recv.handle, recv.weights, group=group)

    layer = jax.shard_map(on_rank, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert"))

    def dense(
        w: jax.Array, x: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array
    ) -> jax.Array:
        """The same on one device: every expert for every token, most of it times 0."""
        chosen = jax.nn.one_hot(topk_idx, EXPERTS)  # a row of zeros for -1
        weight = (chosen * topk_weights[:, :, None]).sum(axis=1)
        return jnp.einsum("th,ehg,te->tg", x, w, weight)

    args = (w, x, topk_idx, topk_weights)
    np.testing.assert_allclose(jax.jit(layer)(*args), dense(*args), rtol=1e-4, atol=1e-5)
    # The backward pass of dispatch is a combine and that of combine a dispatch, over the same
    # handle: who sends what to whom is worked out once, in the forward pass.
    differentiate = functools.partial(jax.grad, argnums=(0, 1, 3))
    got = jax.jit(differentiate(lambda *args: jnp.square(layer(*args)).sum()))(*args)
    want = differentiate(lambda *args: jnp.square(dense(*args)).sum())(*args)
    for name, a, b in zip(("w", "x", "topk_weights"), got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
        print(f"3. The gradient of {name} is that of a dense computation on one device.")
    print()


def too_little_room(group: jax_ep.EpGroup, x: jax.Array, topk_idx: jax.Array) -> None:
    """Step 4: a capacity that is too small for the routing."""
    # All tokens want expert 0 now, where the buffer has room for an even share only.
    topk_idx = topk_idx.at[:, 0].set(0).at[:, 1].set(-1)

    def on_rank(x: jax.Array, topk_idx: jax.Array) -> tuple:
        recv = jax_ep.dispatch(x, topk_idx, group=group)
        back = jax_ep.combine(recv.x, recv.handle, group=group)
        return back, recv.tokens_per_expert, recv.num_dropped[None]

    back, tokens_per_expert, num_dropped = jax.jit(
        jax.shard_map(on_rank, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert"))
    )(x, topk_idx)
    # Rows past the end are dropped, in row order, and counted; their tokens get 0.
    asked, dropped = int(tokens_per_expert[0]), int(num_dropped[0])
    room = group.config.capacity(num_ranks=RANKS, num_tokens=TOKENS)
    print(f"4. Expert 0 was asked for by {asked} tokens, and its rank has {room} rows: the first")
    print(f"   {room} fitted (those of ranks 0 to {room // TOKENS - 1}), {dropped} were dropped.\n")
    assert (asked, dropped) == (RANKS * TOKENS, RANKS * TOKENS - room)
    fitted = np.arange(RANKS * TOKENS)[:, None] < room
    np.testing.assert_array_equal(back, np.where(fitted, x, 0.0))


if __name__ == "__main__":
    main()
