# SPDX-License-Identifier: Apache-2.0
"""EpGroup: sizes, choice of the backend, life and death, and its error messages."""

import copy
import json
import logging
import math
import os
import pathlib
import pickle
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_launch.processes import run_processes
from ep_testing.problems import PROBLEMS, EpProblem
from ep_testing.programs import exchange, make_group, make_mesh, over_ranks
from jax_ep._src.groups import backend_choice, native

PROBLEM = EpProblem(name="group", num_ranks=4, num_tokens=3, num_topk=2, num_experts=8)
CONFIG = jax_ep.EpConfig(**PROBLEM.config_kwargs())


@pytest.fixture
def mesh():
    return make_mesh((2, 4), ("data", "expert"))


def test_sizes(mesh, backend):
    with jax_ep.EpGroup(mesh, "expert", CONFIG, backend=backend) as group:
        assert (group.num_ranks, group.num_local_experts) == (4, 2)
        assert group.heap_bytes == 0
        assert group.backend == backend
        assert f"backend='{backend}'" in repr(group)
    with jax_ep.EpGroup(mesh, ("data", "expert"), CONFIG, backend=backend) as group:
        assert (group.num_ranks, group.num_local_experts) == (8, 1)


def test_it_is_hashable_and_equal_only_to_itself(mesh):
    with (
        jax_ep.EpGroup(mesh, "expert", CONFIG) as one,
        jax_ep.EpGroup(mesh, "expert", CONFIG) as other,
    ):
        assert len({one, other, one}) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": "no mesh"}, "mesh is a str; allowed: a jax.sharding.Mesh"),
        ({"axis_name": "exprt"}, "axis_name 'exprt' is not an axis of the mesh; allowed: "),
        ({"axis_name": ()}, "axis_name is (); allowed: one or more distinct axes"),
        ({"axis_name": ("expert", "expert")}, "allowed: one or more distinct axes"),
        ({"config": {}}, "config is a dict; allowed: an EpConfig"),
        ({"backend": "cuda"}, "backend is 'cuda'; allowed: None, 'ffi', 'xla'"),
        ({"timeout": 0}, "timeout is 0; allowed: None, or seconds above 0 (math.inf)"),
        ({"timeout": float("nan")}, "timeout is nan; allowed: None, or seconds above 0"),
        ({"timeout": "60"}, "timeout is '60'; allowed: None, or seconds above 0"),
        ({"warn_after": -1.0}, "warn_after is -1.0; allowed: None, or seconds above 0"),
        (
            {"warn_after": 5.0, "timeout": 5},
            "warn_after is 5.0 and timeout is 5; allowed: a warn_after below timeout",
        ),
        ({"warn_after": 30.0}, "warn_after is 30.0 and timeout is 30; allowed: a warn_after below"),
        (
            {"config": jax_ep.EpConfig(num_experts=6, num_topk=1, hidden=1, max_tokens_per_rank=1)},
            "EpConfig.num_experts is 6; it must be a multiple of the group's 4 ranks",
        ),
        (
            {
                "config": jax_ep.EpConfig(
                    num_experts=256, num_topk=64, hidden=1, max_tokens_per_rank=2**27
                )
            },
            "set EpConfig.recv_capacity",
        ),
        (
            {
                "config": jax_ep.EpConfig(
                    num_experts=64,
                    num_topk=32,
                    hidden=1,
                    max_tokens_per_rank=256,
                    low_latency_tokens=129,
                )
            },
            "EpConfig.low_latency_tokens is 129; with 4 ranks, num_topk 32 and num_experts 64 at "
            "most 128 are supported",
        ),
        (
            {
                "config": jax_ep.EpConfig(
                    num_experts=1092,
                    num_topk=1,
                    hidden=1,
                    max_tokens_per_rank=4,
                    low_latency_tokens=1,
                )
            },
            "num_experts 1092 at most 0 are supported",
        ),
    ],
)
def test_bad_arguments(mesh, change, message):
    arguments = {"mesh": mesh, "axis_name": "expert", "config": CONFIG, **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        jax_ep.EpGroup(**arguments)


@pytest.mark.parametrize(
    ("arguments", "deadlines"),
    [
        ({}, (10.0, 30.0)),
        ({"timeout": 4}, (2.0, 4.0)),
        ({"timeout": math.inf}, (10.0, math.inf)),
        ({"timeout": 1e300}, (10.0, 1e300)),
        ({"warn_after": 1, "timeout": 2.0}, (1.0, 2.0)),
        ({"warn_after": math.inf, "timeout": math.inf}, (math.inf, math.inf)),
        ({"warn_after": math.inf}, (math.inf, 30.0)),
    ],
)
def test_deadlines(arguments, deadlines, mesh):
    with jax_ep.EpGroup(mesh, "expert", CONFIG, backend="ffi", **arguments) as group:
        assert (group.warn_after, group.timeout) == deadlines
        exchanged = over_ranks(group, lambda x, idx: jax_ep.dispatch(x, idx, group=group).x)
        jax.block_until_ready(exchanged(PROBLEM.x, PROBLEM.topk_idx))


def test_a_copy_of_a_group_is_the_group(mesh):
    with jax_ep.EpGroup(mesh, "expert", CONFIG) as group:
        assert copy.copy(group) is group
        assert copy.deepcopy({"layers": [group]})["layers"][0] is group
        with pytest.raises(TypeError, match="cannot be pickled; pickle its config and the names"):
            pickle.dumps(group)
        assert pickle.loads(pickle.dumps(group.config)) == CONFIG


def test_a_group_is_not_made_inside_jit(mesh, backend):
    def body(x):
        jax_ep.EpGroup(mesh, "expert", CONFIG, backend=backend)
        return x

    with pytest.raises(ValueError, match=r"an EpGroup is made inside jit.*allowed: outside"):
        jax.jit(body)(1.0)


def test_ids_are_those_of_the_next_run_too():
    # They become part of compiled programs, which are looked up in a cache on disk.
    code = (
        "import conftest, jax_ep, test_group as t\n"
        "mesh = t.make_mesh((2, 4), ('data', 'expert'))\n"
        "make = lambda axis: jax_ep.EpGroup(mesh, axis, t.CONFIG, backend='ffi')\n"
        "print([make(axis).group_id for axis in ('expert', 'data', 'expert')])"
    )
    path = os.pathsep.join(p for p in [str(pathlib.Path(__file__).parent), *sys.path] if p)
    runs = [
        subprocess.run(
            [sys.executable, "-P", "-c", code],
            env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert len(set(json.loads(runs[0]))) == 3


def test_close_is_idempotent_and_use_after_close_is_an_error(mesh, backend):
    group = jax_ep.EpGroup(mesh, "expert", CONFIG, backend=backend)
    assert not group.closed
    group.close()
    group.close()
    assert group.closed
    assert "closed" in repr(group)
    with pytest.raises(jax_ep.EpGroupClosed, match="has been closed; make a new EpGroup"):
        over_ranks(group, lambda x, idx: jax_ep.dispatch(x, idx, group=group))(
            PROBLEM.x, PROBLEM.topk_idx
        )
    with pytest.raises(jax_ep.EpGroupClosed), group:
        pass


def test_close_frees_what_the_registry_held(mesh):
    before = native.load().num_groups()
    groups = [jax_ep.EpGroup(mesh, "expert", CONFIG, backend="ffi") for _ in range(3)]
    assert native.load().num_groups() == before + 3
    for group in groups:
        group.close()
    assert native.load().num_groups() == before


def test_groups_of_different_configs_side_by_side(backend):
    problems = [PROBLEMS["tiny"], PROBLEMS["eight_ranks"], PROBLEMS["bfloat16_by_rank"]]
    open_groups = [make_group(problem, backend) for problem in problems]
    for problem in problems:
        got = exchange(problem, backend)
        np.testing.assert_array_equal(got.received.group_sizes, problem.dispatched.group_sizes)
    for group in open_groups:
        group.close()


def test_the_choice_of_the_backend_is_logged_once(mesh, caplog, monkeypatch):
    monkeypatch.setattr(backend_choice, "_logged", set())
    with caplog.at_level(logging.INFO, logger="jax_ep"):
        for _ in range(3):
            with jax_ep.EpGroup(mesh, "expert", CONFIG) as group:
                assert group.backend == "ffi"
    assert [r.message for r in caplog.records] == ["EP backend: ffi"]


def test_without_the_compiled_module_only_xla_is_there(mesh, caplog, monkeypatch):
    why_not = "the compiled module jax_ep._ext does not load (no such file)"
    monkeypatch.setattr(native, "_try_load", lambda: (None, why_not))
    monkeypatch.setattr(backend_choice, "_logged", set())
    with caplog.at_level(logging.INFO, logger="jax_ep"):
        for _ in range(2):
            with jax_ep.EpGroup(mesh, "expert", CONFIG) as group:
                assert group.backend == "xla"
    assert len(caplog.records) == 1
    assert why_not in caplog.text
    with pytest.raises(jax_ep.EpUnavailable, match="does not load"):
        jax_ep.EpGroup(mesh, "expert", CONFIG, backend="ffi")


def test_it_may_be_closed_over_by_jit_and_passed_as_static(mesh):
    with jax_ep.EpGroup(mesh, "expert", CONFIG) as group:
        x = np.ones((24, PROBLEM.hidden), np.float32)
        idx = np.tile(np.array([[0, 5]], np.int32), (24, 1))

        def run(x, idx, group):
            def on_rank(x, idx):
                received = jax_ep.dispatch(x, idx, group=group)
                return jax_ep.combine(received.x, received.handle, group=group)

            spec = P(("data", "expert"))
            return jax.shard_map(on_rank, mesh=group.mesh, in_specs=spec, out_specs=spec)(x, idx)

        np.testing.assert_array_equal(jax.jit(run, static_argnums=2)(x, idx, group), 2 * x)


def test_a_mesh_of_devices_of_another_process(mesh, caplog, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(backend_choice, "_logged", set())
    before = native.load().num_groups()
    message = "backend 'ffi' cannot serve this group: no device of the mesh belongs to this process"
    with pytest.raises(jax_ep.EpUnavailable, match=f"^{re.escape(message)}$"):
        jax_ep.EpGroup(mesh, "expert", CONFIG, backend="ffi")
    assert native.load().num_groups() == before
    with (
        caplog.at_level(logging.INFO, logger="jax_ep"),
        jax_ep.EpGroup(mesh, "expert", CONFIG) as group,
    ):
        assert group.backend == "xla"
    assert [r.message for r in caplog.records] == [
        "EP backend: xla, because ffi cannot serve: no device of the mesh belongs to this process"
    ]


@pytest.mark.multiprocess
def test_each_process_serves_meshes_of_its_own_devices_only():
    outputs = run_processes(
        f"sys.path.append({str(pathlib.Path(__file__).parent)!r})"
        """
import numpy as np
import jax_ep
from ep_testing.programs import over_ranks
from test_group import CONFIG, PROBLEM

for owner in range(2):
    devices = [d for d in jax.devices() if d.process_index == owner]
    mesh = jax.sharding.Mesh(np.array(devices), ("expert",))
    try:
        group = jax_ep.EpGroup(mesh, "expert", CONFIG, backend="ffi")
    except jax_ep.EpUnavailable as e:
        print("mesh of", owner, "refused:", e)
        continue
    with group:
        twice = over_ranks(group, lambda x, idx: (
            lambda r: jax_ep.combine(r.x, r.handle, group=group)
        )(jax_ep.dispatch(x, idx, group=group)))
        np.testing.assert_array_equal(twice(PROBLEM.x, PROBLEM.topk_idx), 2 * PROBLEM.x)
    print("mesh of", owner, "served")
""",
        num_processes=2,
        devices_each=4,
    )
    refused = (
        "refused: backend 'ffi' cannot serve this group: no device of the mesh belongs to this "
        "process"
    )
    for process, output in enumerate(outputs):
        said = [line for line in output.splitlines() if line.startswith("mesh of")]
        want = ["served" if owner == process else refused for owner in range(2)]
        assert said == [f"mesh of {owner} {what}" for owner, what in enumerate(want)]
