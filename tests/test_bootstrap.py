# SPDX-License-Identifier: Apache-2.0
"""Making and closing a group on GPUs over several processes, with a stand-in for the kernels.

The processes and JAX's coordination service are real. The stand-in refuses handles that are of
another group, or not in the order of the ranks.
"""

import pytest

from jax_ep._src.bootstrap import Bootstrap
from jax_ep._src.errors import EpUnavailable
from processes import run_processes

pytestmark = pytest.mark.multiprocess

SET_UP = """
import logging, re, threading, time
import numpy as np
import pytest
from jax.sharding import Mesh
import fake_cuda
import jax_ep

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
fake = fake_cuda.install(pytest.MonkeyPatch())
mesh = Mesh(np.array(jax.devices()).reshape(2, -1), ("data", "expert"))
config = jax_ep.EpConfig(num_experts=12, num_topk=2, hidden=16, max_tokens_per_rank=4)

def refused(words, mesh=mesh, config=config, axis="expert", timeout=60.0):
    begin = time.monotonic()
    with pytest.raises(jax_ep.EpUnavailable, match=words):
        jax_ep.EpGroup(mesh, axis, config, timeout=timeout)
    assert not fake.groups, fake.groups
    assert not [t for t in threading.enumerate() if t.name.startswith("jax_ep")]
    return time.monotonic() - begin
"""


def _run(code, num_processes, devices_each=2):
    return run_processes(SET_UP + code, num_processes=num_processes, devices_each=devices_each)


def test_handles_of_all_processes_arrive_in_the_order_of_ranks():
    # 3 processes x 2 devices as 2 groups of 3 ranks: the second process is in both.
    outputs = _run(
        """
group = jax_ep.EpGroup(mesh, "expert", config)
held = fake.groups[group.group_id]
print("ranks", held["ranks"], "mapped", sorted(held["mapped"].items()))
group.close()
assert not fake.groups
assert fake.log[-2:] == [("disconnect",), ("close",)]
""",
        3,
    )
    mine = [
        [(0, 0, 0), (1, 0, 1)],
        [(0, 0, 2), (1, 1, 0)],
        [(0, 1, 1), (1, 1, 2)],
    ]
    for output, ranks in zip(outputs, mine, strict=True):
        mapped = [((group_index, rank), 3) for _, group_index, rank in ranks]
        assert f"ranks {ranks} mapped {mapped}" in output


def test_groups_do_not_mix():
    # Same mesh and axis twice, other axes, another order of devices, and again after a close.
    _run(
        """
turned = Mesh(mesh.devices[:, ::-1], mesh.axis_names)
both = [jax_ep.EpGroup(mesh, "expert", config) for _ in range(2)]
others = [jax_ep.EpGroup(m, a, config) for m, a in
          [(mesh, "data"), (turned, "expert"), (mesh, ("data", "expert"))]]
nonces = {held["nonce"] for held in fake.groups.values()}
assert len(nonces) == len(fake.groups) == 5
for group in (*both, *others):
    group.close()
with jax_ep.EpGroup(mesh, "expert", config):
    pass
assert not fake.groups
""",
        2,
    )


def test_a_process_that_does_not_come_is_named_within_the_deadline():
    outputs = _run(
        """
if process != 1:
    took = refused(r"process\\(es\\) 1 did not come within 2 s", timeout=2.0)
    assert 1.9 < took < 5, took
    print("named")
""",
        3,
    )
    assert ["named" in output for output in outputs] == [True, False, True]


def test_a_failure_reaches_the_others_at_once():
    _run(
        """
if process == 1:
    fake.refuse["create"] = MemoryError("the heap needs 3 GiB")
    assert refused("cannot serve .*the heap needs 3 GiB") < 20
    fake.refuse.clear()
else:
    assert refused("process 1 could not make it: the heap needs 3 GiB") < 20
    assert not [entry for entry in fake.log if entry[0] == "connect"]

if process == 0:
    fake.refuse["connect"] = RuntimeError("no peer access")
    assert refused("rank 0 .*no peer access") < 20
    fake.refuse.clear()
else:
    assert refused("process 0 could not make it: rank 0 .*no peer access") < 20
assert fake.log[-2:] == [("disconnect",), ("close",)]

jax_ep.EpGroup(mesh, "expert", config).close()  # nothing of the failures is left
assert not fake.groups
""",
        2,
    )


def test_processes_that_disagree_are_told_about_what():
    _run(
        """
import dataclasses
other = dataclasses.replace(config, hidden=32) if process else config
refused("process . made it with another config: .*hidden=", config=other)

from jax_ep._src import cuda_group
real, cuda_group._host = cuda_group._host, lambda: f"host {process}"
refused("its ranks are on several hosts .processes 0 and 1, group_index 0.", axis="data")
with jax_ep.EpGroup(mesh, "expert", config):
    pass  # its groups are inside a host each
""",
        2,
    )


def test_memory_is_freed_only_when_no_process_maps_it():
    outputs = _run(
        """
group = jax_ep.EpGroup(mesh, "expert", config, timeout=30.0)
if process == 1:
    time.sleep(2)
begin = time.monotonic()
group.close()
print("waited" if time.monotonic() - begin > 1 else "came last")
""",
        2,
    )
    assert ["waited" in output for output in outputs] == [True, False]


def test_close_without_a_process_says_so_and_goes_on():
    outputs = _run(
        """
group = jax_ep.EpGroup(mesh, "expert", config, timeout=1.0)
if process == 0:
    group.close()
    assert not fake.groups
""",
        2,
    )
    assert "closed without process(es) 1, which did not close it within 1 s" in outputs[0]


def test_a_process_alone_asks_no_service():
    boot = Bootstrap("key", [0], 0, 1.0)
    assert boot.from_first("nonce", {"nonce": 1}) == {"nonce": 1}
    assert boot.gather("handles", {"a": 2}) == {0: {"a": 2}}
    assert boot.leave("disconnected") == []
    boot.forget("handles")


def test_several_processes_need_the_service():
    with pytest.raises(EpUnavailable, match=r"jax\.distributed\.initialize has not been called"):
        Bootstrap("key", [0, 1], 0, 1.0)
