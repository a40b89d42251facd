# SPDX-License-Identifier: Apache-2.0
"""The picture of docs/guide/balancing.md shows what the planner does."""

import pathlib

import pytest

from ep_testing import program_files

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def program():
    return program_files.load(ROOT / "tools" / "docs" / "balancing_picture.py")


def test_the_picture_is_up_to_date(program):
    written = (ROOT / "docs" / "images" / "balancing.svg").read_text()
    assert written == program.picture(), "run python tools/docs/balancing_picture.py"


def test_its_bars_are_whole_loads(program):
    load = program.load_of_experts()
    for ranks in (program.without_copies(load), program.with_copies(load)):
        totals = [sum(part for _, part in parts) for parts in ranks]
        assert sum(totals) == pytest.approx(8)
    assert max(totals) == pytest.approx(1, abs=1e-3)
