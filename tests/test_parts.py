# SPDX-License-Identifier: Apache-2.0
"""What `pytest --part I/N` runs."""

import pytest

from ep_testing import parts

ALONE = "tests/test_a.py::test_alone"
FEW = [f"tests/test_a.py::test_few[{i}]" for i in range(parts.MANY - 1)]
MANY = [f"tests/test_a.py::test_many[a-{i}]" for i in range(10)]
OF_OTHER_FILE = [f"tests/test_b.py::test_many[{i}]" for i in range(6)]
ALL = [ALONE, *FEW, *MANY, *OF_OTHER_FILE]


def _run(part, of):
    left_out = parts.left_out(ALL, part, of)
    return [name for name in ALL if name not in left_out]


def test_one_part_is_all():
    assert _run(0, 1) == ALL


def test_each_of_many_cases_is_of_one_part_and_all_else_of_each():
    runs = [_run(part, 3) for part in range(3)]
    for name in MANY + OF_OTHER_FILE:
        assert sum(name in run for run in runs) == 1, name
    for run in runs:
        assert {ALONE, *FEW} <= set(run)
        assert 3 <= sum(name in run for name in MANY) <= 4
        assert sum(name in run for name in OF_OTHER_FILE) == 2


def test_parts_count_modulo_their_number():
    assert parts.parse("0/1") == (0, 1)
    assert parts.parse("3005/3") == (2, 3)


@pytest.mark.parametrize("text", ["", "1", "a/3", "1/0", "-1/3", "1/2/3"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="--part is"):
        parts.parse(text)
