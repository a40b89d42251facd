# SPDX-License-Identifier: Apache-2.0
"""Prints what jax_ep and its extras require, without jax_ep itself: `requirements.py [EXTRA...]`.

For an environment in which another build of jax_ep is to be used, such as Bazel's.
"""

import pathlib
import re
import sys
import tomllib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]


def requirements(project: dict, extra: str) -> Iterator[str]:
    """Yields the requirements of an extra, and of those that it includes."""
    for requirement in project["optional-dependencies"][extra]:
        if own := re.fullmatch(r"jax-ep\[(.*)\]", requirement):
            for included in own[1].split(","):
                yield from requirements(project, included)
        else:
            yield requirement


def main() -> None:
    """Prints them, one a line."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {*project["dependencies"]}
    for extra in sys.argv[1:]:
        found.update(requirements(project, extra))
    print("\n".join(sorted(found)))


if __name__ == "__main__":
    main()
