# SPDX-License-Identifier: Apache-2.0
"""The part of a page that a script writes, between two comments that name the script."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]


def replaced(page: str, script: str, text: str) -> str:
    """Returns the page with `text` between the comments of `script`.

    Raises:
        ValueError: if the page does not have both comments, once each.
    """
    begin, end = (f"<!-- {word}: written by {script} -->" for word in ("begin", "end"))
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must have '{begin}' and '{end}' once each")
    before, rest = page.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
