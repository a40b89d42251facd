# SPDX-License-Identifier: Apache-2.0
"""Programs that one process saves and another runs.

The code is that of docs/guide/ready_made_programs.md.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing.programs import make_mesh
from jax_ep._src.groups import native

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "guide" / "ready_made_programs.md"
TARGETS = ("jax_ep_plan", "jax_ep_dispatch", "jax_ep_plan_dispatch", "jax_ep_combine")
HALVES = (
    "jax_ep_dispatch_start", "jax_ep_dispatch_done", "jax_ep_combine_start", "jax_ep_combine_done",
)  # fmt: skip
FORMS = ("executable", "exported")


def _code(heading: str) -> str:
    """What the page runs under a heading; "" is what stands before the first."""
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE):
        title = "" if section.startswith("# ") else section.partition("\n")[0]
        if title == heading:
            blocks = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
            return "\n".join(blocks)
    raise ValueError(heading)


SETUP, GROUP, SAVE, LOAD = map(_code, ("", "Make the groups first", "Save", "Load"))

SAVE_RESULTS = """
np.save(folder / "out.npy", step(x, topk_idx))
np.save(folder / "grad.npy", jax.grad(lambda x: (step(x, topk_idx) ** 2).sum())(x))
"""

LOAD_AND_COMPARE = """
want = np.load(folder / "out.npy")
for _ in range(2):
    np.testing.assert_array_equal(loaded(x, topk_idx), want)
np.testing.assert_array_equal(out, want)
grad = jax.grad(lambda x: (exported.call(x, topk_idx) ** 2).sum())(x)
np.testing.assert_array_equal(grad, np.load(folder / "grad.npy"))
print("same")
"""

# A process goes from no group at all to one that has been closed, and tries to run the programs.
WITHOUT_THE_GROUP = """
import json
programs = {}


def load_executable():
    executable = pickle.loads((folder / "step.executable").read_bytes())
    return serialize_executable.deserialize_and_load(
        *executable, execution_devices=list(mesh.devices.flat)
    )


def load_exported():
    return jax.jit(export.deserialize((folder / "step.exported").read_bytes()).call)


def attempt(form, load):
    try:
        if load:
            programs[form] = {"executable": load_executable, "exported": load_exported}[form]()
        got = np.asarray(programs[form](x, topk_idx))
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    np.testing.assert_array_equal(got, np.load(folder / "out.npy"))
    return "same"


said = {}


def attempt_all(when, load):
    said[when] = {form: attempt(form, load) for form in FORMS}


attempt_all("no group", load=True)
other = Mesh(mesh.devices[:2], ("expert",))
jax_ep.EpGroup(other, "expert", config, backend="ffi")
attempt_all("another group", load=True)
group = jax_ep.EpGroup(mesh, "expert", config, backend="ffi")
attempt_all("loaded before the group", load=False)
attempt_all("the group", load=True)
group.close()
attempt_all("closed", load=False)
jax_ep.EpGroup(mesh, "expert", config, backend="ffi")
attempt_all("the next group", load=True)
print(json.dumps(said))
"""

# Whether the programs of `step` came from the cache.
FROM_THE_CACHE = """
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
program = step.lower(x, topk_idx).compile()
np.testing.assert_array_equal(program(x, topk_idx), np.load(folder / "out.npy"))
print([name.rpartition("/")[2] for name in events if name.endswith(("hits", "misses"))])
"""


def _start(folder: pathlib.Path, *code: str, **env: str) -> subprocess.Popen:
    path = os.pathsep.join(p for p in sys.path if p)
    devices = "--xla_force_host_platform_device_count=8"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", "\n".join(code)],
        env={
            **os.environ,
            "PYTHONPATH": path,
            "XLA_FLAGS": devices,
            "JAX_PLATFORMS": "cpu",
            # As the page says for who saves, whatever the tests themselves run with.
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "PROGRAMS": str(folder),
            **env,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _result(process: subprocess.Popen) -> str:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err[-4000:]
    return out


def _run(folder: pathlib.Path, *code: str, **env: str) -> str:
    return _result(_start(folder, *code, **env))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Has what the page's first process saves, and the results of the direct calls."""
    folder = tmp_path_factory.mktemp("programs")
    _run(folder, SETUP, GROUP, SAVE, SAVE_RESULTS)
    return folder


@pytest.fixture(scope="module")
def said(folder):
    return json.loads(_run(folder, f"FORMS = {FORMS}", SETUP, WITHOUT_THE_GROUP))


def test_a_new_process_runs_what_another_saved(folder):
    assert _run(folder, SETUP, GROUP, LOAD, LOAD_AND_COMPARE).splitlines()[-1] == "same"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("when", "want"),
    [
        ("no group", "NOT_FOUND"),
        (
            "another group",
            "FAILED_PRECONDITION: this plan_dispatch was compiled for an EpGroup that",
        ),
        (
            "closed",
            "FAILED_PRECONDITION: EpGroup 1 (axis 'expert', 4 ranks) of this plan_dispatch has",
        ),
        (
            "the next group",
            "FAILED_PRECONDITION: EpGroup 1 (axis 'expert', 4 ranks) of this plan_dispatch",
        ),
    ],
)
def test_without_its_group_a_program_fails_as_the_page_says(when, want, form, said):
    text = said[when][form]
    assert text.startswith(want), text
    page = " ".join(PAGE.read_text().split())
    if want == "NOT_FOUND":  # XLA's words, which may change
        assert any(name in text for name in TARGETS), text
    else:
        assert text.replace("EpGroup 1 ", "EpGroup 0 ") in page, text


@pytest.mark.parametrize("form", FORMS)
def test_a_program_works_once_its_group_is_there(form, said):
    assert said["loaded before the group"][form] == "same"
    assert said["the group"][form] == "same"


def test_the_compilation_cache_knows_groups_by_their_order(folder, tmp_path):
    env = {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    step = SAVE.partition("executable =")[0]
    first = _run(folder, SETUP, GROUP, step, FROM_THE_CACHE, **env)
    again = _start(folder, SETUP, GROUP, step, FROM_THE_CACHE, **env)
    later = _start(folder, SETUP, GROUP, GROUP, step, FROM_THE_CACHE, **env)
    assert first.strip() == "['cache_misses']"
    assert _result(again).strip() == "['cache_hits']"
    assert _result(later).strip() == "['cache_misses']"


def test_the_page_names_all_targets():
    assert set(native.load().cpu_targets()) == {*TARGETS, *HALVES}
    assert set(re.findall(r'"(jax_ep_\w+)"', SAVE)) == {*TARGETS, *HALVES}
    if native.why_no_cuda() is None:
        assert set(native.load_cuda().cuda_targets()) == {*TARGETS, *HALVES}


def test_only_a_program_whose_targets_are_named_is_exported(backend):
    """Gradients and the FP8 wire call no others; backend `xla` none at all."""
    config = jax_ep.EpConfig(
        num_experts=4, num_topk=2, hidden=128, max_tokens_per_rank=2, dtype=np.float32,
        wire_dtype=jax.numpy.float8_e4m3fn,
    )  # fmt: skip
    mesh = make_mesh((2,), ("expert",))
    arrays = np.ones((4, 128), np.float32), np.tile(np.int32([0, 3]), (4, 1)), np.ones((4, 2), "f4")
    with jax_ep.EpGroup(mesh, "expert", config, backend=backend) as group:

        def loss(x, topk_idx, weights):
            recv = jax_ep.dispatch(x, topk_idx, weights, group=group)
            out = jax_ep.combine(recv.x, recv.handle, recv.weights, group=group).sum()
            dropped = jax_ep.dispatch(x, topk_idx[::-1], group=group).num_dropped
            return (out - dropped.astype(out.dtype))[None]

        over_ranks = jax.shard_map(loss, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
        program = jax.jit(jax.value_and_grad(lambda *args: over_ranks(*args).sum(), argnums=(0, 2)))
        if backend == "xla":
            export.export(program)(*arrays)
            return
        for left_out in TARGETS:
            checks = map(export.DisabledSafetyCheck.custom_call, set(TARGETS) - {left_out})
            with pytest.raises(ValueError, match=f"custom_call @{left_out}"):
                export.export(program, disabled_checks=list(checks))(*arrays)
        checks = map(export.DisabledSafetyCheck.custom_call, TARGETS)
        export.export(program, disabled_checks=list(checks))(*arrays)


def test_a_program_in_halves_calls_targets_of_its_own():
    config = jax_ep.EpConfig(
        num_experts=4, num_topk=2, hidden=8, max_tokens_per_rank=2, dtype=np.float32
    )
    mesh = make_mesh((2,), ("expert",))
    arrays = np.ones((4, 8), np.float32), np.tile(np.int32([0, 3]), (4, 1))
    with jax_ep.EpGroup(mesh, "expert", config, backend="ffi") as group:

        def f(x, topk_idx):
            flight = jax_ep.dispatch_start(x, topk_idx, group=group)
            recv = jax_ep.dispatch_done(flight, group=group)
            flight = jax_ep.combine_start(recv.x, recv.handle, group=group)
            return jax_ep.combine_done(flight, group=group)

        program = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))
        checks = [export.DisabledSafetyCheck.custom_call(name) for name in HALVES]
        for i, left_out in enumerate(HALVES):
            with pytest.raises(ValueError, match=f"custom_call @{left_out}"):
                export.export(program, disabled_checks=checks[:i] + checks[i + 1 :])(*arrays)
        exported = export.export(program, disabled_checks=checks)(*arrays)
        placed = jax.device_put(arrays, jax.sharding.NamedSharding(mesh, P("expert")))
        np.testing.assert_array_equal(jax.jit(exported.call)(*placed), 2 * arrays[0])
