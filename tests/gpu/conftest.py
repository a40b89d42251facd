# SPDX-License-Identifier: Apache-2.0
"""The tests that need a GPU: skipped unless `make gpu` or `make nvlink` runs them."""

import os
from collections.abc import Callable, Iterator

import pytest

from ep_launch import standing
from ep_launch.mps import MpsDaemon
from ep_launch.placement import Placement, count_gpus
from ep_launch.ranks import Case, RankRun, run_ranks


def pytest_runtest_logstart(nodeid: str) -> None:
    """So that whoever ends a run that takes too long knows which test it is at."""
    if "JAX_EP_GPU_TESTS" in os.environ:
        standing.announce("pytest")
        standing.doing(nodeid)


@pytest.fixture(autouse=True, scope="session")
def only_by_make_gpu() -> None:
    """One run of these tests takes all SMs of a GPU, so they do not run beside others."""
    if "JAX_EP_GPU_TESTS" not in os.environ:
        pytest.skip(
            "needs a GPU for itself: `make gpu` runs it, see docs/measurements/gpu_tests.md"
        )


@pytest.fixture(scope="session")
def placement() -> Placement:
    """Of the ranks of all tests."""
    return Placement.chosen()


@pytest.fixture(scope="session")
def mps(placement) -> Iterator[MpsDaemon | None]:
    """A running daemon, which is stopped in any case; None where ranks share no GPU."""
    if placement is not Placement.SHARED:
        yield None
        return
    daemon = MpsDaemon()
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.remove()


@pytest.fixture
def on_ranks(mps, placement, tmp_path_factory) -> Iterator[Callable[..., list[RankRun]]]:
    """`run_ranks` in a folder of its own; after a failure MPS, if it is used, starts anew.

    Skips the test where there are fewer GPUs than it needs.
    """
    is_dirty = False

    def run(
        cases: list[Case], *, num_ranks: int, environment: dict[str, str] | None = None, **kwargs
    ):
        nonlocal is_dirty
        if mps is None and num_ranks > count_gpus():
            pytest.skip(f"{num_ranks} ranks on GPUs of their own: there are {count_gpus()} GPUs")
        is_dirty = True
        runs = run_ranks(
            cases,
            num_ranks=num_ranks,
            placement=placement,
            folder=tmp_path_factory.mktemp("ranks"),
            environment=(mps.environment if mps else {}) | (environment or {}),
            **kwargs,
        )
        is_dirty = any(run.exit_code for run in runs)
        return runs

    yield run
    if is_dirty and mps:
        print(mps.log())
        mps.restart()
