# SPDX-License-Identifier: Apache-2.0
"""What a package index, a host of repositories and a user's pip see: versions, licenses, links."""

import importlib.metadata
import pathlib
import re
import tomllib

import pytest

import jax_ep
from ep_testing import program_files

ROOT = pathlib.Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    not all((ROOT / folder).is_dir() for folder in (".ci", "csrc")),
    reason="of the checkout: `make test` runs it",
)


def _text(path):
    return (ROOT / path).read_text()


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads(_text("pyproject.toml"))


@pytest.fixture(scope="module")
def check_wheel():
    return program_files.load(ROOT / ".ci" / "check_wheel.py")


# --- versions ----------------------------------------------------------------------------------


def test_every_file_names_the_version_of_the_package():
    version = jax_ep.__version__.partition("+")[0]
    newest = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", _text("CHANGELOG.md"), re.MULTILINE)
    assert newest, "CHANGELOG.md has no dated release"
    assert newest[1] == version
    assert f"\nversion: {version}\n" in _text("CITATION.cff")
    assert f'date-released: "{newest[2]}"' in _text("CITATION.cff")
    dependency = f'bazel_dep(name = "jax_ep", version = "{version}")'
    for file in ("docs/guide/bazel.md", "tests/bazel_consumer/MODULE.bazel"):
        assert dependency in _text(file), file


def test_jax_has_no_upper_bound(pyproject):
    project = pyproject["project"]
    extras = project["optional-dependencies"].values()
    of_jax = [r for r in sum(extras, project["dependencies"]) if re.match(r"jax\b(?!-)", r)]
    assert len(of_jax) == 2
    for requirement in of_jax:
        assert re.fullmatch(r"jax(\[cuda13\])?>=0\.10\.2", requirement)


@pytest.mark.parametrize(
    ("python", "jaxlib"),
    [
        ((3, 11), "0.10.2"),
        ((3, 14), "0.10.2"),
        ((3, 15), "0.11.1"),
        ((3, 16), None),  # the installed one
    ],
)
def test_a_build_is_on_the_oldest_jaxlib_that_its_python_has(python, jaxlib):
    tool = program_files.load(ROOT / "tools" / "ffi_headers.py")
    assert tool.pinned_version(python) == jaxlib


def test_a_build_for_a_python_without_a_pin_says_what_it_loads_on(capsys):
    tool = program_files.load(ROOT / "tools" / "ffi_headers.py")
    folder = tool.unpinned_headers((3, 16))
    assert (folder / "xla" / "ffi" / "api" / "c_api.h").exists()
    said = capsys.readouterr().err
    assert f"the headers of jaxlib {importlib.metadata.version('jaxlib')}" in said
    assert "what is built loads on it and newer" in said


def test_every_python_that_is_run_is_classified(pyproject):
    prefix = "Programming Language :: Python :: 3."
    classified = {c for c in pyproject["project"]["classifiers"] if c.startswith(prefix)}
    workflow = _text(".github/workflows/tests.yml")
    tested = re.search(r"python: \[(.*)\]", workflow)[1].replace('"', "").split(", ")
    assert classified == {f"Programming Language :: Python :: {version}" for version in tested}


# --- licenses ----------------------------------------------------------------------------------


def test_the_notices_of_what_is_linked_in_are_those_of_what_is_installed():
    nanobind = pytest.importorskip("nanobind", reason="the build's nanobind is not here")
    installed = importlib.metadata.distribution("nanobind").locate_file("")
    (license_file,) = pathlib.Path(str(installed)).glob("nanobind-*.dist-info/licenses/LICENSE")
    assert _text("licenses/nanobind.txt").endswith(license_file.read_text())
    header = pathlib.Path(nanobind.__file__).parent / "ext/robin_map/include/tsl/robin_map.h"
    comment = re.match(r"/\*\*\n(.*?) \*/", header.read_text(), re.DOTALL)[1]
    assert _text("licenses/robin_map.txt").endswith(re.sub(r"^ \* ?", "", comment, flags=re.M))


def test_all_licenses_are_declared(pyproject):
    declared = pyproject["project"]["license-files"]
    found = {path for pattern in declared for path in ROOT.glob(pattern)}
    assert found == {ROOT / "LICENSE", *(ROOT / "licenses").iterdir()}


# --- what an index shows -----------------------------------------------------------------------


def test_the_readme_of_an_index_links_to_nothing_that_is_not_there(pyproject):
    text = _text("README.md")
    hook = pyproject["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    assert "](docs/" in text
    for substitution in hook["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert "four files to copy" in text, "of links the text stays"


# --- wheels ------------------------------------------------------------------------------------

_SYMBOLS = """
Symbol table '.dynsym' contains 5 entries:
   Num:    Value          Size Type    Bind   Vis      Ndx Name
     0: 0000000000000000     0 NOTYPE  LOCAL  DEFAULT  UND
     1: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND free@GLIBC_2.2.5 (3)
     2: 0000000000012340    82 FUNC    GLOBAL DEFAULT   12 PyInit__ext
     3: 0000000000012400    10 FUNC    WEAK   DEFAULT   12 _ZNSt6vectorD2Ev
     4: 0000000000045000     8 OBJECT  UNIQUE DEFAULT   25 _ZZ3onevE1x
"""


def test_a_symbol_that_others_could_link_with_is_found(check_wheel):
    assert check_wheel.exported(_SYMBOLS) == {"PyInit__ext", "_ZNSt6vectorD2Ev", "_ZZ3onevE1x"}


def test_the_compiled_modules_export_their_entry_points_alone(check_wheel):
    from jax_ep._src.groups import native

    modules = [native.load()]
    if native.why_no_cuda() is None:
        modules.append(native.load_cuda())
    for module in modules:
        symbols = check_wheel.readelf("--dyn-syms", module.__file__)
        assert check_wheel.exported(symbols) == {f"PyInit_{module.__name__.rpartition('.')[2]}"}


def test_what_an_index_would_not_show_well_is_found(check_wheel):
    header = "Description-Content-Type: text/markdown\nRequires-Dist: jax{}\n\n"
    good = header.format(">=0.10.2") + "[a](https://a.example) [b](#b)"
    assert list(check_wheel.metadata_findings(good)) == []
    bad = "Requires-Dist: jax<0.13,>=0.10.2\n\n[a](pages/a.md)"
    found = " ".join(check_wheel.metadata_findings(bad))
    assert "not in Markdown" in found
    assert "links to pages/a.md" in found
    assert "upper bound" in found


# --- pages -------------------------------------------------------------------------------------


def _bare(starlark):
    return re.sub(r"#.*|,(?=\s*\))|\s", "", starlark)


def test_the_files_to_copy_are_those_of_the_monorepo_that_is_tested():
    consumer = ROOT / "tests" / "bazel_consumer"
    page = _text("docs/guide/bazel.md")
    blocks = dict(re.findall(r"^`([\w/.]+)`[^`]*\n\n```text\n(.*?)```", page, re.M | re.S))
    module = _bare((consumer / "MODULE.bazel").read_text())
    assert _bare(blocks["MODULE.bazel"]) == module.replace("../..", "third_party/jax_ep")
    build_file = _bare((consumer / "app" / "BUILD.bazel").read_text())
    assert _bare(blocks["app/BUILD.bazel"]) in build_file
    assert "repo_env=PYTHON_BIN_PATH=" in blocks[".bazelrc"]


def test_every_message_about_what_is_missing_says_how_bazel_looks_again():
    locate = _text("tools/bazel/locate.bzl")
    how = re.search(r"HOW_TO_LOOK_AGAIN = \((.*?)\)\n\n", locate, re.DOTALL)[1]
    assert "bazel sync --configure" in how
    assert re.search(r"def not_found\(.*HOW_TO_LOOK_AGAIN", locate, re.DOTALL)
    for file in ("local_cuda", "local_googletest", "local_python"):
        text = _text(f"tools/bazel/{file}.bzl")
        calls = re.findall(r"(?:fail|_HOW\.format)\((.*?)\)\n", text, re.DOTALL)
        own = [call for call in calls if call != "result.stderr"]  # the tool's own words
        assert own, file
        assert all("HOW_TO_LOOK_AGAIN" in call for call in own), file


def test_what_has_not_run_says_so():
    for workflow in (ROOT / ".github" / "workflows").iterdir():
        assert "NOT RUN YET" in workflow.read_text().splitlines()[1], workflow.name


def test_ci_builds_for_several_hosts_with_the_wheels_that_a_build_brings():
    script = program_files.load(ROOT / "tools" / "bazel" / "nvidia_wheels.py")
    wheels = script.wheels(_text("pyproject.toml"))
    named = re.findall(r'"(nvidia-[\w-]+==[\d.]+)"', _text("pyproject.toml"))
    assert wheels == named
    names = {wheel.partition("==")[0] for wheel in wheels}
    assert {"nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-nvshmem-cu13"} <= names
    workflow = _text(".github/workflows/bazel.yml")
    assert "tools/bazel/nvidia_wheels.py >" in workflow
    assert re.search(r"--//:rdma=true.*//csrc/rdma:libjax_ep_rdma\.so", workflow, re.DOTALL)


def test_the_scripts_of_ci_exist_that_workflows_name():
    workflows = "".join(path.read_text() for path in (ROOT / ".github" / "workflows").iterdir())
    for script in re.findall(r"(?:\.ci|tools)/[\w./]+", workflows):
        assert (ROOT / script).exists(), script
    targets = set(re.findall(r"^([a-z-]+):", _text("Makefile"), re.MULTILINE))
    assert set(re.findall(r"run: make ([a-z-]+)", workflows)) <= targets
