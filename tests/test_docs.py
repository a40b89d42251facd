# SPDX-License-Identifier: Apache-2.0
"""The pages tell the truth: their code runs, and prints what they show.

In README.md and docs/, a block marked `python` is run, those of a page in order and in one
namespace. A block marked `output` holds what the `python` block before it prints; spaces and line
breaks count alike, and groups are not told apart by their numbers.
"""

import contextlib
import importlib
import importlib.util
import io
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import types

import jax
import numpy as np
import pytest

import jax_ep
from ep_testing import program_files
from ep_testing.programs import make_mesh
from jax_ep._src import ranges
from jax_ep._src.groups import backend_choice, native
from jax_ep._src.groups import cpu as cpu_group
from jax_ep._src.groups import cuda as cuda_group

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
README = ROOT / "README.md"

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(page: pathlib.Path) -> list[tuple[str, str, int]]:
    """(language, text, number of the first line) of each fenced block."""
    text = page.read_text()
    return [(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in _BLOCK.finditer(text)]


def _normal(text: str) -> str:
    return re.sub(r"EpGroup \d+", "EpGroup N", " ".join(text.split()))


def _ids(pages):
    return [page.stem for page in pages]


WITH_CODE = [page for page in PAGES if any(kind == "python" for kind, _, _ in _blocks(page))]


@pytest.mark.parametrize("page", WITH_CODE, ids=_ids(WITH_CODE))
def test_code_runs_and_prints_what_the_page_shows(page):
    namespace = {"__name__": "__main__"}
    printed = None
    for kind, text, line in _blocks(page):
        if kind == "python":
            # Lines of a failure are then those of the page.
            code = compile("\n" * (line - 1) + text, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as stream:
                exec(code, namespace)
            printed = stream.getvalue()
        elif kind == "output":
            assert printed is not None, f"{page.name}:{line}: output without code"
            assert _normal(printed) == _normal(text), f"{page.name}:{line} differs:\n{printed}"
            printed = None


def test_the_notebook_runs():
    """Its own process, as it says how many devices there are. The site shows what it prints."""
    text = (ROOT / "docs" / "guide" / "start.md").read_text()
    cells = re.findall(r"^```\{code-cell\} ipython3\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(cells) > 5
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", "\n".join(cells)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("ffi 8 ranks with 2 experts each")


def test_pages_show_what_their_code_prints():
    """A print that the page does not show says nothing to anybody, and is checked by nobody."""
    for page in WITH_CODE:
        blocks = _blocks(page)
        for (kind, text, line), after in zip(blocks, [*blocks[1:], ("", "", 0)], strict=True):
            if kind == "python" and re.search(r"^\s{0,4}print\(", text, re.MULTILINE):
                shows = after[0] == "output" or "def " in text
                assert shows, f"{page.name}:{line}: what this prints is not shown"


CHECK_README = """
import numpy as np
from jax_ep import reference

def dense(x, router, w):
    idx, weights = reference.route(x @ router, num_topk=2)
    y = np.einsum("th,ehf->tef", x, w)
    return sum(weights[:, k, None] * y[np.arange(len(x)), idx[:, k]] for k in range(2))

want = dense(*(np.asarray(a, np.float64) for a in (x, router, w)))
np.testing.assert_allclose(np.asarray(out), want, rtol=1e-4, atol=1e-3)
assert group.backend == "ffi" and group.num_ranks == 8 and group.closed
print("checked")
"""


def test_the_readmes_quickstart_runs():
    code = [text for kind, text, _ in _blocks(README) if kind == "python"]
    assert len(code[0].splitlines()) <= 25, "the quickstart is to be quick"
    shown = [text for kind, text, _ in _blocks(README) if kind == "output"]
    path = os.pathsep.join(p for p in sys.path if p)
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", "\n".join([*code, CHECK_README])],
        env={**env, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert _normal(done.stdout) == _normal("\n".join([*shown, "checked"]))


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 170


def test_the_readmes_times_are_those_of_the_measurements():
    """Microseconds: in README's table and, of the same run, on the page on performance."""
    page = (ROOT / "docs" / "measurements" / "performance.md").read_text()
    table = README.read_text().partition("## Speed")[2]
    ours = {wire: re.search(rf"\| there and back, {wire} .* (\d+) \|$", page, re.M)[1]
            for wire in ("BF16", "FP8 wire")}  # fmt: skip
    assert f"| {ours['BF16']}; {ours['FP8 wire']} | 1 |" in table
    theirs = {
        "capacity all_to_all": re.search(r"capacity all_to_all .* and (\d+)\)", page)[1],
        "all-gather + reduce-scatter": re.search(r"scatter took .* and (\d+) µs", page)[1],
    }
    for name, time in theirs.items():
        ratio = int(time) / int(ours["BF16"])
        assert re.search(rf"{re.escape(name)}[^|]*\| {time} \| {ratio:.2f} \|", table), name


def test_the_readmes_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)", README.read_text(), re.MULTILINE))
    assert {"train", "test", "bench"} <= named <= targets


# --- words -------------------------------------------------------------------------------------


def _not_said() -> list[str]:
    glossary = (ROOT / "docs" / "guide" / "glossary.md").read_text()
    table = glossary[glossary.index("## Not said") :]
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", table, re.MULTILINE)
    return [word for row in rows[1:] for word in row.split(", ")]


def _prose(text: str) -> str:
    without_programs = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    # Names in code, and of files that links lead to, are no words.
    return re.sub(r"`[^`\n]*`|\]\([^)\s]*\)", "", without_programs)


def _said(text: str) -> list[str]:
    return [word for word in _not_said() if re.search(rf"\b{word}\b", _prose(text))]


@pytest.mark.parametrize("page", [README, *PAGES], ids=["root", *_ids(PAGES)])
def test_pages_use_the_words_of_the_glossary(page):
    if page.name != "glossary.md":
        assert not _said(page.read_text()), f"{page.name}: docs/guide/glossary.md says what to say"


def test_words_that_are_not_said_are_found():
    assert _said("The ranks of a meeting. `story.h` runs\n```sh\nrun_story\n```\n") == ["meeting"]
    assert _said("Stories of PEs, internode.") == ["PEs", "internode"]


# --- versions ----------------------------------------------------------------------------------


def test_the_page_on_versions_has_those_of_the_project_and_of_ci():
    page = (ROOT / "docs" / "guide" / "versions.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {"Python": project["requires-python"]}
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *extras["flax"], *extras["rdma"]]:
        name, oldest = re.match(r"([\w-]+)(>=[\d.]+)", requirement).groups()
        required[name] = oldest
    names = {"Python": "Python", "jax": "jax, jaxlib", "flax": "Flax (layers)", "numpy": "NumPy"}
    for name, row in names.items():
        assert f"| {row} | {required[name].removeprefix('>=')} or newer" in page, row
    nvshmem = required["nvidia-nvshmem-cu13"].removeprefix(">=")
    assert f"| NVSHMEM (several hosts) | {nvshmem} or a newer 3 |" in page
    ci = (ROOT / ".ci" / "run").read_text()
    tested = {"0.10.2", *re.findall(r"^(?:bazel|newest)_jax=(\d+\.\d+(?:\.[1-9])?)", ci, re.M)}
    assert "0.10.2 or newer | " + ", ".join(sorted(tested)) in page


# --- the API reference -------------------------------------------------------------------------


def _generator() -> types.ModuleType:
    path = ROOT / "tools" / "docs" / "api_reference.py"
    return program_files.load(path)


def test_the_api_reference_is_up_to_date():
    written = (ROOT / "docs" / "guide" / "api.md").read_text()
    assert written == _generator().page(), "run python tools/docs/api_reference.py"


def test_the_api_reference_has_every_public_name():
    described = _generator().names()
    for title, names in described.items():
        module = importlib.import_module(title)
        public = {n for n in module.__all__ if not isinstance(getattr(module, n), types.ModuleType)}
        if title == "jax_ep.flax.linen":
            public.remove("LayerStats")  # the same as NNX's
        assert public == set(names), title


# --- errors that code on a page cannot show ----------------------------------------------------


def _mesh_of(**device):
    devices = np.array([types.SimpleNamespace(**device), types.SimpleNamespace(**device)])
    return types.SimpleNamespace(devices=devices)


def _parameters(mesh, config):
    return types.SimpleNamespace(mesh=mesh, config=config, num_ranks=2, on_timeout="error")


def test_the_errors_page_has_the_reasons_why_ffi_cannot_serve(monkeypatch, tmp_path):
    page = _normal((ROOT / "docs" / "guide" / "errors.md").read_text())
    config = jax_ep.EpConfig(num_experts=2, num_topk=1, hidden=1, max_tokens_per_rank=1)
    on_tpu = _mesh_of(platform="tpu", process_index=0)
    assert backend_choice._offer("tpu", _parameters(on_tpu, config)).why_not in page
    two_processes = _mesh_of(platform="cpu", process_index=0)
    two_processes.devices[1].process_index = 1
    assert cpu_group.why_not(_parameters(two_processes, config)) in page
    large = jax_ep.EpConfig(num_experts=64, num_topk=33, hidden=1, max_tokens_per_rank=1)
    assert ranges.why_not_on_gpus(large, 2) in page

    too_new = types.SimpleNamespace(ffi_api_version=(0, 5))
    monkeypatch.setattr(native, "_jaxlib_ffi_version", lambda: (0, 3))
    why_not = native._unless_refused("_ext", too_new)[1]
    assert why_not.replace(jax.lib.__version__, "0.10.2") in page

    def import_cuda_not(name):
        if name == "jax_ep._cuda":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return types.SimpleNamespace(ffi_api_version=(0, 3))

    def import_nothing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    for loader in ("_try_load", "_try_load_cuda"):  # not the cached ones
        monkeypatch.setattr(native, loader, getattr(native, loader).__wrapped__)
    on_gpu = _parameters(_mesh_of(platform="gpu", process_index=0), config)
    broken = types.SimpleNamespace(import_module=import_cuda_not)
    monkeypatch.setattr(native, "importlib", broken)
    without_cuda = cuda_group.why_not(on_gpu)
    assert "without CUDA" in without_cuda
    assert without_cuda in page
    broken.import_module = import_nothing
    (tmp_path / "CMakeLists.txt").touch()  # as in a source tree
    monkeypatch.setattr(native, "__file__", str(tmp_path / "jax_ep/_src/groups/native.py"))
    with pytest.raises(jax_ep.EpUnavailable) as caught:
        jax_ep.EpGroup(make_mesh((2,), ("expert",)), "expert", config, backend="ffi")
    assert _normal(str(caught.value)) in page
    assert cuda_group.why_not(on_gpu) in page, "nothing was built, with CUDA or without"


def test_the_errors_page_has_the_message_that_the_c_tests_expect():
    tests = ROOT / "csrc" / "cpu" / "tests" / "calls_test.cc"
    if not tests.exists():
        pytest.skip("the C++ sources are not here")
    page = _normal((ROOT / "docs" / "guide" / "errors.md").read_text())
    messages = re.findall(r'"(ranks disagree: [^"]*)"', tests.read_text())
    assert any(_normal(message) in page for message in messages)
