# SPDX-License-Identifier: Apache-2.0
"""The results of any placement as text: on the terminal, and in Markdown."""

import pathlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ep_bench import expert_copies, host_tables, own_gpu_tables, shared_gpu_tables
from ep_bench.cells import Found
from marked_part import replaced


def _kind(found: Found) -> tuple[str, ModuleType]:
    """The placement that a JSON's keys are those of, and its tables; "own": or one process."""
    if "links" in found:
        return "own", own_gpu_tables
    if "copy" in found:
        return "shared", shared_gpu_tables
    return "cpu", host_tables


def marked_by(found: Found) -> str:
    """What the comments around the tables in a page say."""
    return f"benchmarks/run.py, placement {_kind(found)[0]}"


def merged(parts: Sequence[Found]) -> Found:
    """The numbers of several runs together.

    Raises:
        ValueError: they are not of ranks with a GPU each.
    """
    if len(parts) == 1:
        return parts[0]
    if any("links" not in part for part in parts):
        raise ValueError("only runs with a GPU for each rank can be reported together")
    return own_gpu_tables.merged(parts)


def _text(found: Found, tablefmt: str) -> str:
    tables: Any = _kind(found)[1]
    shown = (f"{title}\n\n{table}" for title, table in tables.parts(found, tablefmt) if table)
    return "\n\n".join([tables.head(found), tables.summary(found), *shown])


def to_text(found: Found) -> str:
    """Everything, for the terminal."""
    if "lines" in found:  # of copies of experts
        return expert_copies.to_text(found["lines"])
    return _text(found, "simple")


def to_markdown(found: Found) -> str:
    """Everything, for docs/measurements/benchmarks.md."""
    return _text(found, "github")


def write_markdown(path: pathlib.Path, found: Found) -> None:
    """Puts the tables between the comments of a page that are for them, or into a new file.

    Raises:
        ValueError: the file exists and has no such comments, so nothing may be replaced.
    """
    marks = (f"<!-- {word}: written by {marked_by(found)} -->" for word in ("begin", "end"))
    page = path.read_text() if path.exists() else "\n".join([*marks, ""])
    path.write_text(replaced(page, marked_by(found), to_markdown(found)))
