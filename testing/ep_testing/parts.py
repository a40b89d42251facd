# SPDX-License-Identifier: Apache-2.0
"""Parts of the test suite: `pytest --part I/N`."""

import collections
from collections.abc import Iterable

# A function of this many cases or more runs a part of them.
MANY = 4


def parse(text: str) -> tuple[int, int]:
    """The numbers of I/N. I may be any number: it counts modulo N."""
    try:
        part, parts = map(int, text.split("/"))
    except ValueError:
        raise ValueError(f"--part is {text!r}; expected I/N, such as 0/3") from None
    if parts < 1 or part < 0:
        raise ValueError(f"--part is {text!r}; I must be at least 0 and N at least 1")
    return part % parts, parts


def left_out(names: Iterable[str], part: int, parts: int) -> set[str]:
    """The tests that are of other parts.

    Of a function with many cases, each case is of one part: every N-th, from the I-th. All other
    tests are of every part.
    """
    cases = collections.defaultdict(list)
    for name in names:
        cases[name.partition("[")[0]].append(name)
    return {
        case
        for of_function in cases.values()
        if len(of_function) >= MANY
        for i, case in enumerate(of_function)
        if i % parts != part
    }
