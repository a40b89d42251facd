# SPDX-License-Identifier: Apache-2.0
"""What pages link to, and the pages that any file names, exist, with their headings.

Checked are the links of all Markdown files, the sources that their prose names, and in every file
of the repository whatever looks like a path below `docs/`: in comments, in messages, in commands.
"""

import pathlib
import re
import subprocess
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
# A path below docs/, and an anchor if there is one. tools/docs is another folder.
_NAMED = re.compile(r"(?<![\w./-])(docs/[\w./-]*\w)(?:#([\w-]+))?")
# A source that a page names: `csrc/core/protocol.h`.
_SOURCE = re.compile(
    r"`((?:benchmarks|cmake|csrc|examples|jax_ep|tests|tools|xla_ffi)/[\w./-]*\w)`"
)
# What was typed when something was measured stays as it was.
_RECORDS = ("benchmarks/results/",)
_RECORDED_LINE = re.compile(r"^\* Command: .*$", re.MULTILINE)


def anchors(page: pathlib.Path) -> set[str]:
    """Returns the anchors of a page, as GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    found: dict[str, int] = {}
    for heading in headings:
        name = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return {f"{name}-{i}" if i else name for name, n in found.items() for i in range(n + 1)}


def _finding(root: pathlib.Path, target: pathlib.Path, anchor: str) -> str | None:
    if not target.is_relative_to(root):
        return "leads out of the repository"
    if not target.exists():
        return "is not there"
    if anchor and (target.suffix != ".md" or anchor not in anchors(target)):
        return "has no such heading"
    return None


def link_findings(root: pathlib.Path, page: pathlib.Path) -> Iterator[str]:
    """Yields what is wrong with the relative links of a Markdown file."""
    for link in _LINK.findall(_CODE.sub("", _FENCE.sub("", page.read_text()))):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if finding := _finding(root, target, anchor):
            yield f"{page.relative_to(root)} links to {link}, which {finding}"


def path_findings(root: pathlib.Path, file: pathlib.Path) -> Iterator[str]:
    """Yields what is wrong with the paths below `docs/` that a file names."""
    try:
        text = file.read_text()
    except UnicodeDecodeError:
        return
    for path, anchor in _NAMED.findall(_RECORDED_LINE.sub("", text)):
        if file.suffix == ".md" and f"]({path}" in text:
            continue  # a link: relative to the page, and not to the root
        if finding := _finding(root, root / path, anchor):
            name = f"{path}#{anchor}" if anchor else path
            yield f"{file.relative_to(root)} names {name}, which {finding}"


def source_findings(root: pathlib.Path, page: pathlib.Path) -> Iterator[str]:
    """Yields the sources that the prose of a Markdown file names and that are not there."""
    for path in _SOURCE.findall(_FENCE.sub("", page.read_text())):
        if not (root / path).exists():
            yield f"{page.relative_to(root)} names {path}, which is not there"


def _files() -> list[pathlib.Path]:
    """The files that git tracks, or would."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to it is not known")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    named = sorted(set(done.stdout.split("\0")) - {""})
    return [ROOT / name for name in named if (ROOT / name).is_file()]


def test_relative_links_resolve():
    pages = [path for path in _files() if path.suffix == ".md"]
    assert ROOT / "README.md" in pages
    assert not [finding for page in pages for finding in link_findings(ROOT, page)]


def test_the_sources_that_pages_name_exist():
    pages = [path for path in _files() if path.suffix == ".md"]
    assert any(_SOURCE.search(page.read_text()) for page in pages)
    assert not [finding for page in pages for finding in source_findings(ROOT, page)]


def test_the_pages_that_files_name_exist():
    here = pathlib.Path(__file__).resolve()  # its tests name pages that do not exist
    files = [path for path in _files() if path != here]
    files = [path for path in files if not str(path.relative_to(ROOT)).startswith(_RECORDS)]
    assert not [finding for path in files for finding in path_findings(ROOT, path)]


def test_the_index_names_every_page():
    index = set(_LINK.findall((ROOT / "docs" / "README.md").read_text()))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages - {"README.md", "index.md"} <= index  # the site's first page is the README


def test_the_site_has_every_page():
    contents = (ROOT / "docs" / "index.md").read_text()
    named = set(re.findall(r"^((?:\w+/)*\w+)$", contents, re.MULTILINE))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert {f"{name}.md" for name in named} == pages - {"index.md"}


# --- the checks find what they are for ---------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "docs" / "guide").mkdir(parents=True)
    (tmp_path / "docs" / "guide" / "a.md").write_text(
        "# The `a` page\n\n## Twice\n\n## Twice\n\n```sh\n# no heading\n```\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("link", "finding"),
    [
        ("guide/a.md", None),
        ("guide/a.md#the-a-page", None),
        ("guide/a.md#twice-1", None),
        ("guide", None),
        ("https://example.com/a.md", None),
        ("#here", None),
        ("a.md", "links to a.md, which is not there"),
        ("guide/a.md#twice-2", "has no such heading"),
        ("guide/a.md#no-heading", "has no such heading"),
        ("#there", "has no such heading"),
        ("../../other/a.md", "leads out of the repository"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(tree, link, finding):
    page = tree / "docs" / "README.md"
    page.write_text(f"# Here\n\n`[code](b.md)` and [a page]({link})\n")
    found = list(link_findings(tree, page))
    assert len(found) == (finding is not None)
    assert finding is None or finding in found[0]


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        ("// see docs/guide/a.md.", None),
        ("see docs/guide/a.md#twice, and docs/guide", None),
        ("tools/docs/gone.py and other/docs/gone.md", None),
        ("* Command: `measure --markdown docs/gone.md`, 2026", None),
        ("[a page](docs/guide/a.md)", None),
        ("// see docs/a.md.", "names docs/a.md, which is not there"),
        ('see("docs/guide/a.md#gone")', "names docs/guide/a.md#gone, which has no such heading"),
        ("--plot docs/images/gone.svg", "which is not there"),
    ],
)
def test_a_page_that_is_not_there_is_found_where_it_is_named(tree, line, finding):
    file = tree / "some.md"
    file.write_text(f"{line}\n")
    found = list(path_findings(tree, file))
    assert len(found) == (finding is not None)
    assert finding is None or finding in found[0]


def test_a_source_that_is_not_there_is_found(tree):
    (tree / "csrc").mkdir()
    (tree / "csrc" / "here.h").touch()
    page = tree / "docs" / "guide" / "b.md"
    page.write_text("`csrc/here.h`, `csrc/gone.h`, `//csrc:gone`\n```sh\ncsrc/gone.cc\n```\n")
    assert list(source_findings(tree, page)) == [
        "docs/guide/b.md names csrc/gone.h, which is not there"
    ]
