# SPDX-License-Identifier: Apache-2.0
"""What profilers see on a GPU: the handlers' ranges of NVTX, where XLA calls them.

A tool takes the place of a profiler, so the program has a process of its own.
"""

import json
import os
import subprocess
import sys

import pytest

LIBRARY = os.environ.get("JAX_EP_NVTX_LOG_LIBRARY", "")
PROGRAM = """
import ctypes, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec as P
import jax_ep

log = ctypes.CDLL(sys.argv[1]).jax_ep_nvtx_log
log.restype = ctypes.c_char_p
mesh = Mesh(np.array(jax.devices("gpu")[:1]), ("expert",))
config = jax_ep.EpConfig(
    num_experts=4, num_topk=2, hidden=64, max_tokens_per_rank=8, low_latency_tokens=4,
    dtype=jnp.float32)
group = jax_ep.EpGroup(mesh, "expert", config)

def layer(x, topk_idx, topk_weights):
    recv = jax_ep.dispatch(x, topk_idx, topk_weights, group=group)
    return jax_ep.combine(recv.x, recv.handle, recv.weights, group=group)

spec = P("expert")
f = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec))
seen = {}
for tokens in (8, 4):
    x = jnp.ones((tokens, 64))
    idx = jnp.zeros((tokens, 2), jnp.int32).at[:, 1].set(1)
    arguments = (x, idx, jnp.full((tokens, 2), 0.5))
    f(*arguments).block_until_ready()
    log()
    for _ in range(3):
        f(*arguments).block_until_ready()
    seen[tokens] = log().decode().splitlines()
print(json.dumps([group.name, group.backend, seen]))
"""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        not os.path.isfile(LIBRARY),
        reason="not built: tests/gpu/run.py builds it where the CUDA toolkit has NVTX",
    ),
]


def _pushed(flags: str) -> tuple[str, str, dict[str, list[str]]]:
    """The group's name, its backend, and by number of tokens the ranges that were begun."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, LIBRARY],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cuda",
            "NVTX_INJECTION64_PATH": LIBRARY,
            "XLA_FLAGS": flags,
        },
        stdout=subprocess.PIPE,
        text=True,
        timeout=100,
        check=True,
    )
    name, backend, seen = json.loads(done.stdout.splitlines()[-1])
    # XLA has ranges of its own, in its domain, around ours.
    ours = {
        tokens: [
            words[3]
            for line in lines
            if (words := line.split(" ", 3))[2] == "jax_ep" and words[0] == "push"
        ]
        for tokens, lines in seen.items()
    }
    return name, backend, ours


def test_each_call_has_a_range_with_its_groups_name():
    name, backend, seen = _pushed("--xla_gpu_enable_command_buffer=")
    assert backend == "ffi"
    calls = [f"jax_ep.{operation}[{name}]" for operation in ("plan_dispatch", "combine")]
    assert seen == {"8": 3 * calls, "4": 3 * calls}


def test_where_a_graph_is_launched_no_handler_is_called():
    graphs = "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL --xla_gpu_graph_min_graph_size=1"
    name, _, seen = _pushed(graphs)
    for ranges in seen.values():
        assert len(ranges) < 3 * 2, ranges
        assert all(name in text for text in ranges)
