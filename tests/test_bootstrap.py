# SPDX-License-Identifier: Apache-2.0
"""Making and closing a group on GPUs over several processes, with a stand-in for the kernels.

The processes and JAX's coordination service are real. The stand-in refuses handles that are of
another group, or not in the order of the ranks.
"""

import re

import pytest

from ep_launch.processes import run_processes
from jax_ep._src.errors import EpUnavailable
from jax_ep._src.groups.bootstrap import Bootstrap

pytestmark = pytest.mark.multiprocess

SET_UP = """
import logging, re, time
import numpy as np
import pytest
from jax.sharding import Mesh
from ep_testing import fake_cuda
import jax_ep

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
fake = fake_cuda.install(pytest.MonkeyPatch())
mesh = Mesh(np.array(jax.devices()).reshape(2, -1), ("data", "expert"))
config = jax_ep.EpConfig(num_experts=12, num_topk=2, hidden=16, max_tokens_per_rank=4)

def refused(words, mesh=mesh, config=config, axis="expert", timeout=60.0, backend=None):
    begin = time.monotonic()
    with pytest.raises(jax_ep.EpUnavailable, match=words):
        jax_ep.EpGroup(mesh, axis, config, timeout=timeout, backend=backend)
    assert not fake.groups, fake.groups
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

from jax_ep._src.groups import cuda as cuda_group
real, cuda_group.host = cuda_group.host, lambda: f"host {process}"
refused("its ranks are on several hosts, and in process 0, this installation .*without RDMA",
        axis="data", backend="ffi")
with jax_ep.EpGroup(mesh, "data", config) as group:
    assert group.backend == "xla"  # in both processes, before anything is allocated
assert not [entry for entry in fake.log if entry[0] == "create"], fake.log
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


def test_close_leaves_memory_that_a_process_may_still_map():
    # Freed, it would be given to somebody else while the late process still stores into it.
    outputs = _run(
        """
group = jax_ep.EpGroup(mesh, "expert", config, timeout=1.0)
if process == 0:
    group.close()
    assert fake.left == [group.group_id]
else:
    time.sleep(3)
    group.close()
    assert fake.left == []  # the other one is past it
""",
        2,
    )
    assert "closed without process(es) 1, which did not close it within 1 s" in outputs[0]
    assert "are left as they are until this process ends" in outputs[0]


def test_a_process_that_ends_closes_its_groups_also_those_that_nobody_holds():
    outputs = _run(
        """
import gc
close_group = fake.close_group
def closing(**arguments):
    close_group(**arguments)
    print("closed", not fake.groups, fake.left, flush=True)
fake.close_group = closing
group = jax_ep.EpGroup(mesh, "expert", config)
if process == 0:
    del group
    gc.collect()
    print("still open", len(fake.groups))
else:
    group.close()
""",
        2,
    )
    assert "still open 1" in outputs[0]
    assert "closed True []" in outputs[0]


def test_a_process_that_failed_before_can_come_later():
    # A notebook's interrupt, say: the others' attempts are not in the way of a later one.
    _run(
        """
if process == 0:
    refused(r"process\\(es\\) 1 did not come within 2 s", timeout=2.0)
else:
    time.sleep(4)  # it failed on its own, and is tried again
for _ in range(3):
    with jax_ep.EpGroup(mesh, "expert", config, timeout=30.0) as group:
        held = fake.groups[group.group_id]
        assert held["num_ranks"] == 2
assert not fake.groups
""",
        2,
    )


def test_groups_are_known_by_the_same_number_after_failures():
    outputs = _run(
        """
ids = []
for attempt in range(3):
    if attempt == 1 and process == 1:
        fake.refuse["create"] = MemoryError("the heap needs 3 GiB")
    try:
        with jax_ep.EpGroup(mesh, "expert", config, timeout=30.0) as group:
            ids.append(group.group_id)
    except jax_ep.EpUnavailable:
        pass
    fake.refuse.clear()
print("ids", ids)
""",
        2,
    )
    ids = [next(line for line in o.splitlines() if line.startswith("ids")) for o in outputs]
    assert ids[0] == ids[1]
    assert len(set(ids[0].split())) == 3


def test_all_processes_choose_the_same_backend():
    outputs = _run(
        """
from jax_ep._src.groups import native
if process == 1:
    native._try_load_cuda = lambda: (None, "the module is not there")
    native.why_no_cuda = lambda: "the module is not there"
with jax_ep.EpGroup(mesh, "expert", config) as group:
    print("backend", group.backend)
refused("in process 1, the module is not there", backend="ffi")
""",
        2,
    )
    assert all("backend xla" in output for output in outputs)


def test_a_process_that_is_late_is_named_in_the_log():
    outputs = _run(
        """
if process == 1:
    time.sleep(3)
with jax_ep.EpGroup(mesh, "expert", config, warn_after=0.5, timeout=60.0):
    pass
""",
        2,
    )
    words = (
        r"WARNING making or closing an EpGroup: process 0 has waited [\d.]+ s for process 1 "
        r"\(join\); giving up after 60 s"
    )
    assert re.search(words, outputs[0]), outputs[0]


def test_a_process_whose_attempt_failed_waits_for_the_next_one_and_says_so():
    outputs = _run(
        """
import jax_ep._src.groups.bootstrap as bootstrap
if process == 1:
    begin = bootstrap.Bootstrap.begin
    def interrupted(self):
        begin(self)
        raise KeyboardInterrupt
    bootstrap.Bootstrap.begin = interrupted
    try:
        jax_ep.EpGroup(mesh, "expert", config, timeout=60.0)
    except KeyboardInterrupt:
        pass
    bootstrap.Bootstrap.begin = begin
else:
    refused("process 1 could not make it: KeyboardInterrupt")
    time.sleep(3)
with jax_ep.EpGroup(mesh, "expert", config, warn_after=0.5, timeout=60.0):
    pass
""",
        2,
    )
    assert "for process 0 (begin); giving up after 60 s" in outputs[1]


def test_a_process_alone_asks_no_service():
    boot = Bootstrap("digest", [0], 0, warn_after=1.0, timeout=1.0)
    assert isinstance(boot.begin(), int)
    assert boot.gather("handles", {"a": 2}) == {0: {"a": 2}}
    boot.all_have_begun()
    assert boot.leave("disconnected", 1.0) == []
    boot.forget("handles")


def test_several_processes_need_the_service():
    with pytest.raises(EpUnavailable, match=r"jax\.distributed\.initialize has not been called"):
        Bootstrap("digest", [0, 1], 0, warn_after=1.0, timeout=1.0)
