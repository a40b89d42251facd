# SPDX-License-Identifier: Apache-2.0
"""Checks an installed jax_ep from the outside: `check_install.py ffi | without-module`.

With `ffi`, the compiled module must load on this jaxlib and move tokens. With `without-module`,
the module is not there: the package must import all the same, and serve with lax collectives.
"""

import os
import pathlib
import platform
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax_ep

LOADED_BY_IMPORT = set(sys.modules)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec


def check_import() -> None:
    """Importing takes the installed package, and neither Flax nor the compiled module."""
    path = pathlib.Path(jax_ep.__file__).resolve()
    assert path.is_relative_to(pathlib.Path(sys.prefix).resolve()), f"jax_ep is at {path}"
    loaded = LOADED_BY_IMPORT & {"flax", "jax_ep._ext", "optax"}
    assert not loaded, f"import jax_ep imports {loaded}"


def check_tokens(backend: str) -> None:
    """Every token comes back as often as it was selected, times its experts' answers."""
    ranks, tokens, hidden, experts, topk = 8, 16, 24, 16, 3
    config = jax_ep.EpConfig(
        num_experts=experts,
        num_topk=topk,
        hidden=hidden,
        max_tokens_per_rank=tokens,
        dtype=jnp.float32,
    )
    mesh = jax.make_mesh((ranks,), ("expert",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 9, (ranks * tokens, hidden)).astype(np.float32)
    topk_idx = rng.permuted(np.tile(np.arange(experts, dtype=np.int32), (len(x), 1)), axis=1)
    with jax_ep.EpGroup(mesh, "expert", config) as group:
        assert group.backend == backend, f"backend is {group.backend}, expected {backend}"

        def there_and_back(x: jax.Array, topk_idx: jax.Array) -> jax.Array:
            recv = jax_ep.dispatch(x, topk_idx, None, group=group)
            return jax_ep.combine(recv.x, recv.handle, group=group)

        spec = PartitionSpec("expert")
        mapped = jax.shard_map(there_and_back, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
        out = jax.jit(mapped)(x, topk_idx[:, :topk])
        np.testing.assert_array_equal(np.asarray(out), topk * x)


def check_refusal() -> None:
    """Asking for the backend that is not there says why it is not."""
    config = jax_ep.EpConfig(num_experts=8, num_topk=1, hidden=1, max_tokens_per_rank=1)
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(AxisType.Auto,))
    try:
        jax_ep.EpGroup(mesh, "expert", config, backend="ffi")
    except jax_ep.EpUnavailable as e:
        message = str(e)
    else:
        raise AssertionError("backend='ffi' was accepted without the compiled module")
    assert "_ext" in message, f"the error does not name the module: {message}"
    print(f"asked for ffi: {message}")


def main() -> None:
    """Runs the checks."""
    if sys.argv[1:] not in (["ffi"], ["without-module"]):
        raise SystemExit(__doc__)
    backend = {"ffi": "ffi", "without-module": "xla"}[sys.argv[1]]
    check_import()
    check_tokens(backend)
    if backend == "xla":
        check_refusal()
    versions = f"Python {platform.python_version()}, jaxlib {jax.lib.__version__}"
    print(f"jax_ep {jax_ep.__version__} works with backend {backend}: {versions}")


if __name__ == "__main__":
    main()
