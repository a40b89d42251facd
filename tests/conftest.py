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


@pytest.fixture(params=["ffi", "xla"])
def backend(request: pytest.FixtureRequest) -> str:
    """Runs a test with each backend."""
    return request.param
