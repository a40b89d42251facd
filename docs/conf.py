# SPDX-License-Identifier: Apache-2.0
"""The site, by Sphinx, from the Markdown of this folder: `make docs`.

The pages are those that one reads in the repository. Three things are made for the site: the API
reference comes from autodoc, so that other projects can link to its names; links to sources lead to
copies of them; and the notebook, `guide/start.md`, is run.
"""

import importlib
import inspect
import os
import pathlib
import re
import shutil
import sys
from logging import Filter, LogRecord, getLogger
from typing import Any

import numpy.typing as npt
from docutils import nodes
from pygments.lexers.special import TextLexer
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.typing import stringify_annotation

import jax_ep

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools" / "docs"))
api_reference = importlib.import_module("api_reference")

os.environ["JAX_PLATFORMS"] = "cpu"  # of the notebook, too

project = "jax_ep"
copyright = "the jax_ep authors"
release = version = jax_ep.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
]
root_doc = "index"

html_theme = "furo"
html_title = f"jax_ep {release}"
html_static_path = ["site"]
html_css_files = ["tables.css"]

# Anchors as the repository's pages have them: links are the same there and here.
myst_heading_anchors = 4

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120

autodoc_member_order = "bysource"
napoleon_attr_annotations = False  # signatures have them
toc_object_entries = False  # there is a heading for each name
python_maximum_signature_line_length = 88
# In docstrings `name` is code, and a link where it names something.
default_role = "py:obj"

intersphinx_mapping = {
    "flax": ("https://flax.readthedocs.io/en/stable", None),
    "jax": ("https://docs.jax.dev/en/latest", None),
    "numpy": ("https://numpy.org/doc/stable", None),
}
intersphinx_timeout = 5

# `make linkcheck` is about those that lead outside; the build itself checks all others.
linkcheck_ignore = [r"(?!https?:)"]
linkcheck_timeout = 10

# Where the files of the repository are on the web, such as https://github.com/NAME/jax_ep/blob/main.
# Without it, links to sources lead to copies in the site.
SOURCE_URL = os.environ.get("JAX_EP_SOURCE_URL", "")


# --- the API reference -------------------------------------------------------------------------


def _directive(module: str, name: str) -> str:
    value = getattr(importlib.import_module(module), name)
    if isinstance(value, type):
        return f".. autoclass:: {module}.{name}\n   :members:\n   :special-members: __call__"
    return f".. auto{'function' if callable(value) else 'data'}:: {module}.{name}"


def _replace_api(app: Sphinx, page: str, source: list[str]) -> None:
    """Makes of guide/api.md, which has the same names in the same order, directives of autodoc."""
    if page != "guide/api":
        return
    parts = ["# API reference", "The letters are those of the [glossary](glossary.md)."]
    for module, names in api_reference.names().items():
        parts += [f"## {module}", f"```{{eval-rst}}\n.. automodule:: {module}\n```"]
        for name in names:
            directive = f"```{{eval-rst}}\n{_directive(module, name)}\n```"
            parts += [f"### `{module}.{name}`", directive]
    source[0] = "\n\n".join(parts)


def _skip(app: Sphinx, what: str, name: str, member: Any, *_: Any) -> bool | None:
    """Fields are in the docstrings of their classes; their default values need no entry."""
    own = inspect.isfunction(member) and member.__module__.startswith("jax_ep")
    return None if own or isinstance(member, property) or what != "class" else True


def _signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, arguments: str | None, result: Any
) -> tuple[str | None, Any] | None:
    """Aliases by their names, and defaults as one writes them: what Sphinx prints is no Python."""
    if arguments is None:
        return None
    dtype = stringify_annotation(npt.DTypeLike, "smart")
    arguments = arguments.replace(dtype, "~numpy.typing.DTypeLike")
    arguments = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", arguments)
    arguments = re.sub(r"<(?:jitted )?(?:Pjit)?[Ff]unction (\w+)[^>]*>", r"\1", arguments)
    return arguments, result


def _tables(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Makes Markdown's tables in docstrings those of reStructuredText."""
    made: list[str] = []
    previous = ""
    for line in lines:
        row = line.strip()
        indent = line[: len(line) - len(line.lstrip())]
        if row.startswith("|"):
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            if not previous.startswith("|"):
                made += ["", f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
            if not all(re.fullmatch(":?-+:?", cell) for cell in cells):
                made.append(f"{indent}   * - {cells[0]}")
                made += [f"{indent}     - {cell}" for cell in cells[1:]]
        else:
            made += ["", line] if previous.startswith("|") else [line]
        previous = row
    lines[:] = made


# --- links to sources --------------------------------------------------------------------------


class SourceLinks(SphinxTransform):
    """Links to files that are no pages lead to SOURCE_URL, or else to copies in the site."""

    default_priority = 500  # as most; before pages are looked for, and downloads collected

    def apply(self, **kwargs: Any) -> None:
        """Replaces such links in a page."""
        for kind in (addnodes.download_reference, addnodes.pending_xref):
            for node in list(self.document.findall(kind)):
                if kind is addnodes.download_reference or node.get("reftype") == "myst":
                    self._link(node)

    def _link(self, node: nodes.Element) -> None:
        page, target = self.env.docname, node["reftarget"].partition("#")[0]
        # What is included from README.md is relative to the repository.
        folders = [ROOT / "docs" / pathlib.PurePosixPath(page).parent]
        folders += [ROOT] if page == root_doc else []
        # Of a page outside of docs/ MyST has made an absolute path, without .md.
        candidates = [(f / name).resolve() for f in folders for name in (target, f"{target}.md")]
        path = next((path for path in candidates if target and path.exists()), None)
        if path == ROOT / "README.md":
            uri = self.app.builder.get_relative_uri(page, root_doc)
            uri += f"#{node['reftargetid']}" if node.get("reftargetid") else ""
        elif path and path.is_relative_to(ROOT) and not self._is_page(path):
            name = path.relative_to(ROOT).as_posix()
            uri = f"{SOURCE_URL}/{name}" if SOURCE_URL else self._copy(path, name)
        else:
            return  # MyST says so if it leads nowhere
        internal = not uri.startswith("https:")
        link = nodes.reference("", "", *node.children, internal=internal, refuri=uri)
        node.replace_self(link if uri else node.children)

    def _is_page(self, path: pathlib.Path) -> bool:
        return path.suffix == ".md" and path.is_relative_to(ROOT / "docs")

    def _copy(self, path: pathlib.Path, name: str) -> str:
        if path.is_dir():
            return ""
        copy = pathlib.Path(self.app.outdir) / "sources" / f"{name}.txt"  # which a browser shows
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        return f"{'../' * self.env.docname.count('/')}sources/{name}.txt"


# --- inventories -------------------------------------------------------------------------------


class _AsNotice(Filter):
    """An inventory that does not load is no failure: the build needs no network."""

    def filter(self, record: LogRecord) -> bool:
        if "failed to reach any of the inventories" not in record.getMessage():
            return True
        sys.stderr.write("notice: an inventory did not load; names of that project are no links\n")
        return False


def setup(app: Sphinx) -> None:
    """Registers what is above."""
    for kind in ("mermaid", "output"):  # of blocks; nothing draws the one, and the other is text
        app.add_lexer(kind, TextLexer)
    app.add_transform(SourceLinks)
    app.connect("source-read", _replace_api)
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _tables, priority=100)  # before napoleon's
    getLogger("sphinx.sphinx.ext.intersphinx").addFilter(_AsNotice())
