# SPDX-License-Identifier: Apache-2.0
"""Importing does no work and needs nothing that is not used; the command line works."""

import os
import re
import subprocess
import sys
import types

import pytest

import jax_ep


def _run(code: str, **env: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _check(code: str, **env: str) -> str:
    done = _run(code, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked} or name in {blocked}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
"""


def test_import_loads_neither_jax_nor_flax_nor_the_compiled_module():
    _check(
        "import sys, jax_ep\n"
        "loaded = {'jax', 'flax', 'jax_ep._ext'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )


def test_import_reads_no_environment():
    # Asked by our own modules, that is: the finder of an editable install reads it too.
    _check(
        "import os, sys\n"
        "class Watched(dict):\n"
        "    def get(self, *a):\n"
        "        asked_by = sys._getframe(1).f_globals.get('__name__', '')\n"
        "        assert not asked_by.startswith('jax_ep'), f'{asked_by} reads {a}'\n"
        "        return super().get(*a)\n"
        "    __getitem__ = __contains__ = get\n"
        "os.environ = Watched(os.environ); os.getenv = os.environ.get\n"
        "import jax_ep"
    )


def test_using_every_public_name_starts_no_backend():
    _check(
        "import jax_ep, jax\n"
        "for name in jax_ep.__all__: getattr(jax_ep, name)\n"
        "from jax.extend import backend as _\n"
        "import jax._src.xla_bridge as bridge\n"
        "assert not bridge._backends, bridge._backends"
    )


def test_without_flax_everything_else_is_there():
    out = _check(
        BLOCK.format(blocked={"flax"}) + "import jax_ep\n"
        "for name in jax_ep.__all__: getattr(jax_ep, name)\n"
        "try:\n"
        "    import jax_ep.flax.nnx\n"
        "except ImportError as e:\n"
        "    print(e)"
    )
    assert "blocked: flax" in out or "jax-ep[flax]" in out


def test_without_the_compiled_module_the_xla_backend_works_and_ffi_says_why_not():
    out = _check(
        BLOCK.format(blocked={"jax_ep._ext"}) + "import jax, jax_ep, numpy as np\n"
        "from jax.sharding import Mesh, PartitionSpec as P\n"
        "mesh = Mesh(np.array(jax.devices()[:2]), ('e',))\n"
        "config = jax_ep.EpConfig(num_experts=2, num_topk=1, hidden=4, max_tokens_per_rank=3,"
        " dtype='float32')\n"
        "try:\n"
        "    jax_ep.EpGroup(mesh, 'e', config, backend='ffi')\n"
        "except jax_ep.EpUnavailable as e:\n"
        "    print(e)\n"
        "group = jax_ep.EpGroup(mesh, 'e', config)\n"
        "def f(x, i):\n"
        "    r = jax_ep.dispatch(x, i, group=group)\n"
        "    return jax_ep.combine(r.x, r.handle, group=group)\n"
        "x = np.arange(24, dtype=np.float32).reshape(6, 4)\n"
        "i = np.array([[0], [1], [1], [0], [0], [-1]], np.int32)\n"
        "y = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P('e'), out_specs=P('e')))(x, i)\n"
        "np.testing.assert_array_equal(y, x * (i >= 0))\n"
        "print(group.backend)",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    assert "backend 'ffi' cannot serve this group" in out
    assert "blocked: jax_ep._ext" in out
    assert out.endswith("xla\n")


def test_the_binary_is_built_for_the_oldest_supported_jaxlib():
    from jax_ep._src.groups import native

    # Python 3.15 has no jaxlib older than 0.11.1.
    oldest = (0, 3) if sys.version_info < (3, 15) else (0, 4)
    assert native.load().ffi_api_version == oldest


def test_the_version_of_the_ffi_is_read_from_the_installed_jaxlib():
    from jax_ep._src.groups import native

    assert native.load().ffi_api_version <= native._jaxlib_ffi_version() < (1, 0)


@pytest.mark.parametrize(
    ("built_on", "found", "says"),
    [
        ((0, 3), (0, 3), None),
        ((0, 3), (0, 9), None),
        ((0, 3), None, None),  # a jaxlib without headers
        ((0, 4), (0, 3), "built on version 0.4 .* it has 0.3, .* install a newer jax"),
        ((0, 3), (1, 0), "built on version 0.3 .* it has 1.0, .* or an older jax"),
        ((1, 0), (0, 9), "built on version 1.0 .* it has 0.9, .* or an older jax"),
    ],
)
def test_a_module_that_xla_would_refuse_is_not_loaded(monkeypatch, built_on, found, says):
    from jax_ep._src.groups import native

    module = types.SimpleNamespace(ffi_api_version=built_on)
    monkeypatch.setattr(
        native, "importlib", types.SimpleNamespace(import_module=lambda name: module)
    )
    monkeypatch.setattr(native, "_jaxlib_ffi_version", lambda: found)
    for loader, name in (("_try_load", "_ext"), ("_try_load_cuda", "_cuda")):
        loaded, why_not = getattr(native, loader).__wrapped__()
        if says is None:
            assert (loaded, why_not) == (module, None)
        else:
            assert loaded is None
            assert re.search(rf"the compiled module jax_ep\.{name}, .*{says}", why_not)


def test_a_jaxlib_without_headers_has_no_known_version(monkeypatch, tmp_path):
    import jax

    from jax_ep._src.groups import native

    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    assert native._jaxlib_ffi_version() is None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'jax_ep' has no attribute 'no_such_name'"):
        _ = jax_ep.no_such_name
    assert set(jax_ep.__all__) <= set(dir(jax_ep))


def test_a_name_that_is_gone_is_an_error_that_gives_the_new_spelling():
    new = r"'moe_with_stats'; jax_ep\.moe\(\.\.\., with_stats=True\) takes its place"
    with pytest.raises(AttributeError, match=new):
        _ = jax_ep.moe_with_stats


def test_info_prints_the_table():
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "jax_ep", "info"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    for part in ("jaxlib", "devices (cpu)", "ffi on CPU", "xla", "NVSHMEM", "RDMA NICs", "peer"):
        assert part in done.stdout


def test_the_command_line_refuses_other_words():
    from jax_ep.__main__ import main

    with pytest.raises(SystemExit) as caught:
        main(["inform"])
    assert caught.value.code == 2
