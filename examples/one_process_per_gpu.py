# SPDX-License-Identifier: Apache-2.0
"""An exchange among processes with a GPU each: the least that such a program needs.

    srun python examples/one_process_per_gpu.py                       # or see slurm/
    python examples/one_process_per_gpu.py --coordinator HOST:PORT --processes 8 --process I

Every rank sends tokens to experts on all others, gets them back, and compares. With
JAX_PLATFORMS=cpu it runs without GPUs; the backend is `xla` then.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep

TOKENS, HIDDEN, TOPK = 128, 256, 2


def join() -> None:
    """Meets the other processes, before JAX looks for devices."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coordinator", help="HOST:PORT of process 0; without it, from SLURM")
    parser.add_argument("--processes", type=int, help="how many there are on all hosts")
    parser.add_argument("--process", type=int, help="which of them this one is")
    parser.add_argument("--device", type=int, help="its GPU on its host; --process if left out")
    options = parser.parse_args()
    if options.coordinator is None:
        jax.distributed.initialize()
        return
    device = options.process if options.device is None else options.device
    on_cpu = jax.config.jax_platforms == "cpu"
    jax.distributed.initialize(
        options.coordinator,
        options.processes,
        options.process,
        local_device_ids=None if on_cpu else [device],
    )


def main() -> None:
    """Joins, makes a group of all devices, and exchanges."""
    join()
    # Each process makes the same mesh of all devices, and then the same groups in the same order.
    mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(AxisType.Auto,))
    ranks = mesh.size
    config = jax_ep.EpConfig(
        num_experts=2 * ranks,
        num_topk=TOPK,
        hidden=HIDDEN,
        max_tokens_per_rank=TOKENS,
        dtype=jnp.float32,
    )
    with jax_ep.EpGroup(mesh, "expert", config) as group:

        def there_and_back(x: jax.Array, topk_idx: jax.Array) -> jax.Array:
            recv = jax_ep.dispatch(x, topk_idx, group=group)
            out = jax_ep.combine(recv.x, recv.handle, group=group)
            wrong = jnp.sum(out != TOPK * x)  # each token came back from each of its experts
            return jax.lax.psum(wrong, "expert")

        # A process brings the tokens of its own devices.
        local = jax.local_device_count() * TOKENS
        rng = np.random.default_rng(jax.process_index())
        x = rng.integers(-9, 9, (local, HIDDEN)).astype(np.float32)
        experts = np.tile(np.arange(2 * ranks, dtype=np.int32), (local, 1))
        topk_idx = rng.permuted(experts, axis=1)[:, :TOPK]
        split = NamedSharding(mesh, P("expert"))
        arrays = [jax.make_array_from_process_local_data(split, a) for a in (x, topk_idx)]
        f = jax.shard_map(there_and_back, mesh=mesh, in_specs=P("expert"), out_specs=P())
        wrong = int(jax.jit(f)(*arrays))
    if jax.process_index() == 0:
        print(f"{ranks} ranks in {jax.process_count()} processes, backend {group.backend}")
        print(f"{wrong} wrong elements")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
