# SPDX-License-Identifier: Apache-2.0
"""The kernels' mutants are edits of lines that there are; `make mutants` runs them."""

import pathlib
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parents[1] / "csrc" / "kernels" / "tests"


@pytest.fixture(scope="module")
def mutants():
    sys.path.insert(0, str(TESTS))
    try:
        import mutants
    finally:
        sys.path.remove(str(TESTS))
    return mutants


def test_each_mutant_changes_its_header(mutants):
    for mutant in mutants.MUTANTS:
        changed = mutants.mutate(mutant) != (mutants.ROOT / mutant.path).read_text()
        assert changed or mutant.name == "unchanged", mutant.name


def test_no_two_mutants_have_one_name(mutants):
    names = [mutant.name for mutant in mutants.MUTANTS]
    assert len(names) == len(set(names))
