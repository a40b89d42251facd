# SPDX-License-Identifier: Apache-2.0
"""The strict environment of all tests: 16 CPU devices, no implicit promotion, no warnings."""

import os

# Before JAX starts its backends. 16 devices, so that one test can have more of them than cores.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=16"
)

import hypothesis
import jax
import pytest

from ep_testing import parts

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part",
        default="0/1",
        help="I/N: of tests with many cases every N-th, from the I-th; N such parts are all",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is of another part."""
    try:
        part = parts.parse(config.getoption("--part"))
    except ValueError as e:
        raise pytest.UsageError(str(e)) from None
    others = parts.left_out((item.nodeid for item in items), *part)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in others])
    items[:] = [item for item in items if item.nodeid not in others]


@pytest.fixture(params=["ffi", "xla"])
def backend(request: pytest.FixtureRequest) -> str:
    """Runs a test with each backend."""
    return request.param
