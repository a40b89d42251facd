# SPDX-License-Identifier: Apache-2.0
"""Public names as type checkers, `help()`, tracebacks and pickle see them."""

import ast
import importlib
import importlib.util
import json
import os
import pathlib
import pickle
import pydoc
import re
import subprocess
import sys
import sysconfig
import traceback

import jax
import pytest
from flax import nnx

import jax_ep

PACKAGE = pathlib.Path(jax_ep.__file__).parent
MODULES = (
    *("jax_ep", "jax_ep.experts", "jax_ep.flax", "jax_ep.flax.linen", "jax_ep.flax.nnx"),
    *("jax_ep.plot", "jax_ep.reference", "jax_ep.serving"),
)

# What a user may write. Each line that ends with "wrong" has to be an error, all others none.
USER = """
from typing import assert_type

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

import jax_ep
from jax_ep import EpGroupp  # wrong
from jax_ep import combine, experts, reference
from jax_ep.flax.nnx import MoE

SIZES = jax_ep.EpConfig(num_experts=8, num_topk=2, hidden=64, max_tokens_per_rank=32)
config = jax_ep.EpConfig(
    num_experts=8, num_topk=2, hidden=64, max_tokens_per_rank=32,
    dtype=jnp.bfloat16, wire_dtype=jnp.float8_e4m3fn, layout="expert", drop="even",
)
for of_dtype in (np.float32, ml_dtypes.bfloat16, np.dtype("float16"), "float32"):
    jax_ep.EpConfig(num_experts=8, num_topk=2, hidden=64, max_tokens_per_rank=3, dtype=of_dtype)
jax_ep.EpConfig(num_expert=8, num_topk=2, hidden=64, max_tokens_per_rank=3)  # wrong
jax_ep.EpConfig(num_experts=8, num_topk=2, hidden=64, max_tokens_per_rank=3, dtype=3)  # wrong
jax_ep.EpConfig(num_experts=8, num_topk=2, hidden=64, max_tokens_per_rank=3, drop="all")  # wrong
assert_type(config.dtype.itemsize, int)
config.with_capacity(2.0)  # wrong

mesh = jax.make_mesh((4,), ("expert",))
with jax_ep.EpGroup(mesh, "expert", config, backend="ffi", timeout=5) as group:
    print(group.name, group.heap_bytes // group.num_ranks, group.tuning.low_latency_tokens)
    print(group.backend == "ffi", group.health().waiting)  # wrong
    print(group.num_rank)  # wrong
jax_ep.EpGroup(mesh, "expert", config, backend="fii")  # wrong
jax_ep.EpGroup(mesh, ("node", "gpu"), config, backend="xla")
jax_ep.EpGroup(mesh, config, "expert")  # wrong


def layer(x: jax.Array, i: jax.Array, p: jax.Array, w: jax.Array) -> jax.Array:
    recv = jax_ep.dispatch(x, i, p, group=group)
    jax_ep.dispatch(x, i, p)  # wrong
    jax_ep.dispatchh(x, i, p, group=group)  # wrong
    assert_type(recv, jax_ep.Dispatched)
    y = jax.lax.ragged_dot(recv.x, w, recv.group_sizes)
    print(recv.group_size)  # wrong
    if isinstance(recv.x, jax_ep.QuantizedRows):
        print(recv.x.scales.shape)
    return combine(y, recv.handle, recv.weights, group=group)


def ffn(x: jax.Array, i: jax.Array, p: jax.Array, w: jax.Array) -> jax.Array:
    i, p = jax_ep.route(x, num_topk=2, score="softmax")
    jax_ep.route(x, num_topk=2, score="soft")  # wrong
    out, stats = jax_ep.moe(x, i, p, w, w, w, group=group, with_stats=True)
    assert_type(stats, jax_ep.MoeStats)
    assert_type(jax_ep.moe(x, i, p, w, w, w, group=group), jax.Array)
    jax_ep.moe(x, i, p, w, w, w, group=group, with_stat=True)  # wrong
    jax_ep.moe(x, i, p, w, w, w, group=group).num_dropped  # wrong
    jax_ep.moe_with_experts(x, i, p, experts.gated(w, w, w), group=group)
    jax_ep.moe_with_experts(x, i, p, experts.gate(w, w, w), group=group)  # wrong
    flight = jax_ep.dispatch_start(x, i, p, group=group)
    jax_ep.combine_done(flight, group=group)  # wrong
    print(jax_ep.dispatch_done(flight, group=group).num_dropped)
    return out + stats.num_dropped


moe = MoE(group, 128, rngs=nnx.Rngs(0))
assert_type(moe, jax_ep.flax.nnx.MoE)
assert_type(moe(jnp.zeros((8, 64))), jax.Array)
print(moe.spec.ffn, moe.selection_bias is None or moe.selection_bias.get_value().shape)
assert_type(moe.w_gate.get_value(), jax.Array)
print(moe.tokens_per_expert.get_value().sum() + moe.num_dropped.get_value(), moe.router.shape)
out, stats = moe.with_stats(jnp.zeros((8, 64)))
print(out + stats.num_lost, stats.rows_per_rank.sum())
print(stats.num_losts)  # wrong
jax_ep.moe(out, out, out, moe.w_gate, moe.w_up, moe.w_down, group=group)  # Params, as they are
print(moe.specs)  # wrong
print(moe.w_gates)  # wrong
jax_ep.flax.nnx.MOE  # wrong
jax_ep.flax.nxx  # wrong
jax_ep.flax.nnx.MoE(group, "128", rngs=nnx.Rngs(0))  # wrong
jax_ep.flax.nnx.MoE(group, 128, replicas="both", rngs=nnx.Rngs(0))  # wrong
jax_ep.flax.linen.MoE(group, 128, placement=None)
jax_ep.reference.dispatchh  # wrong
reference.silu(np.zeros(3))
jax_ep.plot.heat_maps  # wrong
jax_ep.moe_with_stats  # wrong
print(jax_ep.__version__ + "")
"""


# --- type checkers -----------------------------------------------------------------------------


def _import_path():
    """The folder of an editable install's package, which checkers do not find by themselves."""
    folder = PACKAGE.parent
    installed = {pathlib.Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    return None if folder in installed else str(folder)


def _check(tmp_path, *arguments):
    for module in ("mypy", "basedpyright"):
        if "TEST_SRCDIR" in os.environ or importlib.util.find_spec(module) is None:
            pytest.skip("type checkers are run by `make test`, which installs them")
    # `pyright --verifytypes` takes the packages of the `python` on PATH, and no option for it.
    env = os.environ | {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    if path := _import_path():
        env |= {"MYPYPATH": path, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def user(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    settings = {"include": ["user.py"], "typeCheckingMode": "standard"}
    settings["extraPaths"] = [path] if (path := _import_path()) else []
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = silent\n")
    return tmp_path


def _wrong_lines():
    return {n for n, line in enumerate(USER.splitlines(), 1) if line.endswith("# wrong")}


def _compare(found):
    lines = USER.splitlines()
    missed = [lines[n - 1] for n in sorted(_wrong_lines() - found.keys())]
    assert not missed, "these lines are errors, and the checker says nothing"
    assert not {n: found[n] for n in found.keys() - _wrong_lines()}


@pytest.mark.slow
def test_mypy_accepts_what_is_right_and_finds_what_is_wrong(user):
    out = _check(user, "mypy", "--strict", "--config-file=mypy.ini", "--cache-dir=cache", "user.py")
    errors = re.findall(r"^user\.py:(\d+): error: (.*)$", out, re.MULTILINE)
    _compare({int(line): text for line, text in errors})
    assert 'no attribute "dispatchh"' in out


def test_pyright_accepts_what_is_right_and_finds_what_is_wrong(user):
    out = _check(user, "basedpyright", "--outputjson", "--pythonpath", sys.executable)
    found = json.loads(out)["generalDiagnostics"]
    errors = [d for d in found if d["severity"] == "error"]
    _compare({d["range"]["start"]["line"] + 1: d["message"] for d in errors})
    assert '"dispatchh" is not a known attribute of module "jax_ep"' in out.replace('\\"', '"')


def test_all_public_types_are_complete(tmp_path):
    asked = ("--verifytypes", "jax_ep", "--ignoreexternal", "--outputjson")
    report = json.loads(_check(tmp_path, "basedpyright", *asked))["typeCompleteness"]
    public = [s for s in report["symbols"] if s["isExported"]]
    assert len(public) > 150
    assert {s["name"]: s["diagnostics"] for s in public if not s["isTypeKnown"]} == {}
    assert report["completenessScore"] == 1


# --- the lists of names in jax_ep/__init__.py --------------------------------------------------


def _names_for_checkers(path):
    """Module -> names that are imported as themselves under `if TYPE_CHECKING`."""
    names = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                assert isinstance(statement, ast.ImportFrom)
                for alias in statement.names:
                    assert alias.asname == alias.name, "else checkers do not take it for public"
                    names[alias.name] = f"{statement.module}"
    return names


def test_checkers_and_python_see_the_same_names():
    submodules = dict.fromkeys(jax_ep._SUBMODULES, "jax_ep")
    assert _names_for_checkers(PACKAGE / "__init__.py") == {**jax_ep._EXPORTS, **submodules}
    assert set(_names_for_checkers(PACKAGE / "flax" / "__init__.py")) == set(
        jax_ep.flax._SUBMODULES
    )


def test_checkers_see_what_a_layer_sets_by_name():
    layer = next(
        node
        for node in ast.parse((PACKAGE / "flax" / "nnx.py").read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "MoE"
    )
    declared = {
        ast.unparse(statement.target)
        for node in layer.body
        if isinstance(node, ast.If)
        for statement in node.body
    }
    config = jax_ep.EpConfig(num_experts=4, num_topk=1, hidden=8, max_tokens_per_rank=2)
    with jax_ep.EpGroup(jax.make_mesh((2,), ("e",)), "e", config) as group:
        moe = jax_ep.flax.nnx.MoE(
            group,
            4,
            num_shared_experts=1,
            shared_gate=True,
            router_bias=True,
            selection_bias=True,
            normalize=False,
            num_logical_experts=2,
            rngs=nnx.Rngs(0),
        )
    found = {name for name, value in vars(moe).items() if isinstance(value, nnx.Variable)}
    assert declared | {"selection_bias"} == found


def test_names_to_import_by_a_star_need_no_extra():
    plain = {name for name, needed in jax_ep._SUBMODULES.items() if needed is None}
    assert sorted(jax_ep.__all__) == sorted({*jax_ep._EXPORTS, *plain})
    assert len(jax_ep.__all__) == len(set(jax_ep.__all__))


def test_dir_has_the_public_names_alone(monkeypatch):
    names = {*jax_ep.__all__, "__version__"}
    assert set(dir(jax_ep)) == {*names, "flax", "plot"}
    assert all(hasattr(jax_ep, name) for name in dir(jax_ep))
    assert dir(jax_ep.flax) == sorted(jax_ep.flax.__all__)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert set(dir(jax_ep)) == names  # help(jax_ep) gets each of them


# --- where names say that they are -------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_public_objects_say_the_public_module(module):
    names = importlib.import_module(module).__all__
    assert names
    for name in names:
        value = getattr(importlib.import_module(module), name)
        if not callable(value):
            continue  # a module, or a constant
        assert value.__module__ in MODULES, name
        assert getattr(importlib.import_module(value.__module__), name) is value
        assert pickle.loads(pickle.dumps(value)) is value
        if name != "LayerStats":  # the same for both of Flax's APIs
            assert value.__module__ == module, name


def test_tracebacks_and_help_name_the_public_module():
    lines = traceback.format_exception_only(jax_ep.EpUnavailable("because"))
    assert lines == ["jax_ep.EpUnavailable: because\n"]
    title = pydoc.render_doc(jax_ep.dispatch, renderer=pydoc.plaintext).splitlines()
    assert title[0].endswith("function dispatch in module jax_ep")
    assert "group: jax_ep.EpGroup" in title[2]
    assert "_src" not in pydoc.render_doc(jax_ep.EpHealth, renderer=pydoc.plaintext)


# --- Flax, when it is first used ---------------------------------------------------------------


def _run(code):
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_flax_layers_are_there_without_an_import_of_their_own():
    done = _run("import jax_ep; print(jax_ep.flax.nnx.MoE, jax_ep.flax.linen.MoE.__module__)")
    assert done.stdout == "<class 'jax_ep.flax.nnx.MoE'> jax_ep.flax.linen\n", done.stderr
    with pytest.raises(AttributeError, match=r"module 'jax_ep\.flax' has no attribute 'nxx'"):
        _ = jax_ep.flax.nxx


@pytest.mark.parametrize(
    "use", ["jax_ep.flax", "jax_ep.flax.nnx.MoE", "importlib.import_module('jax_ep.flax.linen')"]
)
def test_without_flax_one_sentence_says_what_to_install(use):
    done = _run(f"import importlib, sys, jax_ep; sys.modules['flax'] = None; {use}")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith(
        "ModuleNotFoundError: jax_ep.flax needs Flax, which is not installed: "
        "pip install 'jax-ep[flax]'"
    )
