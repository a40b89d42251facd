# SPDX-License-Identifier: Apache-2.0
"""A grouped matrix product that reads rows in FP8, between `dispatch` and `combine`.

    python examples/fp8_grouped_matmul.py

With `EpConfig.recv_dtype` float8_e4m3fn the receive buffer holds what was on the wire: one byte for
each element, and a float32 scale for each 128. Restoring the rows first would write and read an
array of twice that size. The product here takes them as they are: it multiplies the 128 columns of
a block in FP8, and scales what comes out.

This is a forward pass, as inference has it. `jax_ep.moe` differentiates rows in FP8, and restores
them for its products.
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

RANKS, TOKENS, HIDDEN, FFN, EXPERTS, TOPK = 8, 16, 320, 64, 16, 2
BLOCK = 128  # elements that share a scale


def grouped_matmul(rows: jax_ep.QuantizedRows, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """`[C, F]` float32: every row times the matrix of its group, as `jax.lax.ragged_dot` does.

    Row `c` of group `g` is `sum_b scales[c, b] * (values[c, b] @ w[g, b])` over blocks `b` of 128
    columns. FP8 values are exact in the dtype of `w`, so nothing is rounded before the sums.

    Args:
        rows: `[C, H]`, those of a group next to each other.
        w: `[L, H, F]`, bfloat16, float16 or float32.
        group_sizes: `[L]` integers.
    """
    hidden = rows.values.shape[1]
    num_blocks = rows.scales.shape[1]
    padding = num_blocks * BLOCK - hidden
    values = jnp.pad(rows.values, ((0, 0), (0, padding)))
    w = jnp.pad(w, ((0, 0), (0, padding), (0, 0)))

    def add_block(b: jax.Array, total: jax.Array) -> jax.Array:
        block = jax.lax.dynamic_slice_in_dim(values, b * BLOCK, BLOCK, axis=1)
        product = jax.lax.ragged_dot(
            block.astype(w.dtype),
            jax.lax.dynamic_slice_in_dim(w, b * BLOCK, BLOCK, axis=1),
            group_sizes,
            preferred_element_type=jnp.float32,
        )
        return total + jax.lax.dynamic_slice_in_dim(rows.scales, b, 1, axis=1) * product

    # The first block by itself, so that the loop's sum varies over the mesh as its terms do.
    first = add_block(jnp.int32(0), jnp.float32(0))
    return jax.lax.fori_loop(1, num_blocks, add_block, first)


def layer(
    group: jax_ep.EpGroup,
    x: jax_ep.QuantizedRows,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
) -> tuple[jax.Array, jax_ep.Dispatched, jax.Array]:
    """The output, what this rank received, and the gate of its rows."""
    recv = jax_ep.dispatch(x, topk_idx, topk_weights, group=group)
    gate = grouped_matmul(recv.x, w_gate, recv.group_sizes)
    up = grouped_matmul(recv.x, w_up, recv.group_sizes)
    inner = (jax.nn.silu(gate) * up).astype(w_down.dtype)
    y = jax.lax.ragged_dot(inner, w_down, recv.group_sizes)
    out = jax_ep.combine(y, recv.handle, recv.weights, group=group)
    return out, recv, gate


def make_arguments() -> tuple:
    """Tokens, routing and experts of all ranks."""
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (RANKS * TOKENS, HIDDEN), jnp.bfloat16)
    logits = jax.random.normal(keys[1], (RANKS * TOKENS, EXPERTS))
    shapes = (EXPERTS, HIDDEN, FFN), (EXPERTS, HIDDEN, FFN), (EXPERTS, FFN, HIDDEN)
    weights = [
        jax.random.normal(key, shape, jnp.bfloat16) / shape[1] ** 0.5
        for key, shape in zip(keys[2:], shapes, strict=True)
    ]
    return x, *jax_ep.route(logits, num_topk=TOPK), *weights


def check_products(
    rows: jax_ep.QuantizedRows, group_sizes: jax.Array, gate: jax.Array, w_gate: jax.Array
) -> None:
    """Holds the gates of all ranks against float64, within the rounding of float32 sums."""
    values, scales = (
        np.asarray(part, np.float64).reshape(RANKS, -1, part.shape[-1])
        for part in (rows.values, rows.scales)
    )
    restored = values * np.repeat(scales, BLOCK, axis=-1)[..., :HIDDEN]
    sizes = np.asarray(group_sizes).reshape(RANKS, -1)
    gate = np.asarray(gate).reshape(RANKS, -1, FFN)
    matrices = np.asarray(w_gate, np.float64).reshape(RANKS, -1, HIDDEN, FFN)
    for rank in range(RANKS):
        start = 0
        for size, matrix in zip(sizes[rank], matrices[rank], strict=True):
            block = restored[rank, start : start + size]
            # At most so much is lost by HIDDEN products and sums, and by one scale for each.
            bound = 2 * (HIDDEN + 2) * 2.0**-24 * (np.abs(block) @ np.abs(matrix))
            error = np.abs(gate[rank, start : start + size] - block @ matrix)
            assert np.all(error <= bound), f"off by {np.max(error)}"
            start += size


def main() -> None:
    """Runs the layer on eight ranks, and checks it."""
    mesh = jax.make_mesh((RANKS,), ("expert",), axis_types=(AxisType.Auto,))
    config = jax_ep.EpConfig(
        num_experts=EXPERTS,
        num_topk=TOPK,
        hidden=HIDDEN,
        max_tokens_per_rank=TOKENS,
        wire_dtype=jnp.float8_e4m3fn,
        recv_dtype=jnp.float8_e4m3fn,
    )
    x, topk_idx, topk_weights, *weights = make_arguments()
    with jax_ep.EpGroup(mesh, "expert", config) as group:

        def on_rank(x: jax.Array, *args: jax.Array) -> tuple:
            # Quantized once, where it is made; the bits are those that dispatch would have sent.
            out, recv, gate = layer(group, jax_ep.quantize(x), *args)
            return out, recv.x, recv.group_sizes, gate

        spec = P("expert")
        run = jax.jit(jax.shard_map(on_rank, mesh=mesh, in_specs=spec, out_specs=spec))
        out, rows, group_sizes, gate = run(x, topk_idx, topk_weights, *weights)
        moe = jax.shard_map(
            functools.partial(jax_ep.moe, group=group), mesh=mesh, in_specs=spec, out_specs=spec
        )
        want = jax.jit(moe)(x, topk_idx, topk_weights, *weights)
    held = rows.values.nbytes + rows.scales.nbytes
    print(f"1. The receive buffers hold {held:,} bytes; in bfloat16 it would be")
    print(f"   {2 * rows.values.size:,}.")
    check_products(rows, group_sizes, gate, weights[0])
    print("2. The product of rows in FP8 is that of float64, but for the rounding of its sums.")
    # `moe` rounds restored rows to bfloat16, and its products too.
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(want, np.float32), rtol=0.05, atol=0.05
    )
    print("3. The layer's output is that of jax_ep.moe.")


if __name__ == "__main__":
    main()
