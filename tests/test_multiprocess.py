# SPDX-License-Identifier: Apache-2.0
"""Backend `xla` over several processes: 2 processes x 4 devices, checked against the oracle."""

import pytest

from ep_launch.processes import run_processes

NUM_PROCESSES = 2
DEVICES_EACH = 4

WORKER = """
import numpy as np
import jax_ep
from jax.sharding import NamedSharding, PartitionSpec as P
from ep_testing.problems import PROBLEMS
from jax_ep import reference

problem = PROBLEMS["eight_ranks"]
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("expert",))
config = jax_ep.EpConfig(**problem.config_kwargs())
try:
    jax_ep.EpGroup(mesh, "expert", config, backend="ffi")
except jax_ep.EpUnavailable as e:
    assert "spans several" in str(e), e
else:
    raise AssertionError("ffi served a mesh of several processes")
group = jax_ep.EpGroup(mesh, "expert", config)
assert group.backend == "xla"

def on_rank(x, idx, w):
    x, idx, w = x[0], idx[0], w[0]
    received = jax_ep.dispatch(x, idx, w, group=group)
    def loss(x):
        r = jax_ep.dispatch(x, idx, w, group=group)
        return jax_ep.combine(r.x, r.handle, r.weights, group=group).sum()
    out = jax_ep.combine(received.x, received.handle, group=group)
    return received.x[None], out[None], jax.grad(loss)(x)[None]

sharding = NamedSharding(mesh, P("expert"))
args = [
    jax.make_array_from_callback(a.shape, sharding, lambda i, a=a: a[i])
    for a in (problem.x, problem.topk_idx, problem.topk_weights)
]
got = jax.jit(jax.shard_map(on_rank, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))(*args)
rows = problem.dispatched.x
want = (
    rows,
    reference.combine(rows, problem.plan, dtype=problem.np_dtype),
    np.broadcast_to(problem.topk_weights.sum(-1, keepdims=True), problem.x.shape),
)
for g, w in zip(got, want, strict=True):
    for shard in g.addressable_shards:
        np.testing.assert_allclose(np.asarray(shard.data), w[shard.index], rtol=1e-5)
print("process", process, "agrees with the oracle on", len(jax.local_devices()), "devices")
"""


@pytest.mark.multiprocess
def test_two_processes_of_four_devices_agree_with_the_oracle():
    outputs = run_processes(WORKER, num_processes=NUM_PROCESSES, devices_each=DEVICES_EACH)
    for i, output in enumerate(outputs):
        assert f"process {i} agrees with the oracle on {DEVICES_EACH} devices" in output
