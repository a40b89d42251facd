# SPDX-License-Identifier: Apache-2.0
"""The tests that need a GPU: skipped unless `make gpu` runs them."""

import os
from collections.abc import Callable, Iterator

import pytest

from gpu.mps import MpsDaemon
from gpu.ranks import Case, RankRun, run_ranks


@pytest.fixture(autouse=True, scope="session")
def only_by_make_gpu() -> None:
    """One run of these tests takes all SMs of a GPU, so they do not run beside others."""
    if "JAX_EP_GPU_TESTS" not in os.environ:
        pytest.skip("needs a GPU for itself: `make gpu` runs it, see docs/gpu_tests.md")


@pytest.fixture(scope="session")
def mps() -> Iterator[MpsDaemon]:
    """A running daemon, which is stopped in any case."""
    daemon = MpsDaemon()
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.remove()


@pytest.fixture
def on_ranks(mps, tmp_path_factory) -> Iterator[Callable[..., list[RankRun]]]:
    """`run_ranks` under MPS, in a folder of its own; starts the daemon anew after a failure."""
    is_dirty = False

    def run(cases: list[Case], *, environment: dict[str, str] | None = None, **kwargs):
        nonlocal is_dirty
        is_dirty = True
        runs = run_ranks(
            cases,
            folder=tmp_path_factory.mktemp("ranks"),
            environment=mps.environment | (environment or {}),
            **kwargs,
        )
        is_dirty = any(run.exit_code for run in runs)
        return runs

    yield run
    if is_dirty:
        print(mps.log())
        mps.restart()
