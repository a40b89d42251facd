# SPDX-License-Identifier: Apache-2.0
"""Which GPUs the kernels serve, and what a group does on others: with a stand-in, without a GPU."""

import importlib.util
import logging
import re

import jax
import pytest

import jax_ep
from ep_testing import fake_cuda
from ep_testing.programs import make_mesh
from jax_ep._src import info
from jax_ep._src.groups import backend_choice, gpu_architectures
from jax_ep._src.groups.gpu_architectures import serves

CONFIG = jax_ep.EpConfig(num_experts=8, num_topk=2, hidden=16, max_tokens_per_rank=4)
# Hopper, Blackwell, Blackwell Ultra, Thor, RTX of Blackwell, and one that does not exist yet.
KNOWN = [(8, 0), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (13, 0)]


@pytest.mark.parametrize(
    ("architecture", "served"),
    [
        ("90-real", [(9, 0)]),
        ("90a-real", [(9, 0)]),
        ("90a-virtual", [(9, 0)]),
        ("90-virtual", [(9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (13, 0)]),
        ("90", [(9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (13, 0)]),
        ("100-real", [(10, 0), (10, 3)]),
        ("100a-real", [(10, 0)]),
        ("100f-real", [(10, 0), (10, 3)]),
        ("100f-virtual", [(10, 0), (10, 3)]),
        ("100f", [(10, 0), (10, 3)]),
        ("103-real", [(10, 3)]),
        ("native", KNOWN),
    ],
)
def test_what_an_architecture_serves(architecture, served):
    assert [capability for capability in KNOWN if serves(architecture, capability)] == served


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(backend_choice, "_logged", set())
    return fake_cuda.install(monkeypatch)


def _gpus_of(capability, monkeypatch):
    monkeypatch.setattr(jax.Device, "compute_capability", capability, raising=False)


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ("9.0", None),
        ("10.0", None),
        ("10.3", None),
        ("11.0", None),
        ("8.0", "the kernels cannot run: they need 9.0 or newer"),
        (
            "12.0",
            "the kernels cannot run: a block has at most 99 KiB of shared memory there, and they "
            "need 226",
        ),
        ("gfx942", "there are no kernels: they are for NVIDIA GPUs"),
    ],
)
def test_a_group_is_served_by_its_gpus_or_falls_back(capability, reason, fake, monkeypatch, caplog):
    _gpus_of(capability, monkeypatch)
    mesh = make_mesh((4,), ("expert",))
    with (
        caplog.at_level(logging.WARNING, logger="jax_ep"),
        jax_ep.EpGroup(mesh, "expert", CONFIG) as made,
    ):
        assert made.backend == ("ffi" if reason is None else "xla")
    if reason is None:
        assert ("create", 0, -1) in fake.log
        return
    assert not fake.log, "nothing is registered or allocated"
    reason = f"on cpu (compute capability {capability}) {reason}"
    assert caplog.messages == [f"EP backend: xla, because ffi cannot serve: {reason}"]
    with pytest.raises(jax_ep.EpUnavailable, match=re.escape(f"cannot serve this group: {reason}")):
        jax_ep.EpGroup(mesh, "expert", CONFIG, backend="ffi")
    assert not fake.log


def test_a_build_for_other_gpus_is_named_with_what_to_do(fake, monkeypatch):
    build = fake.build_info() | {"architectures": "90a-real, 100a-real"}
    fake.build_info = lambda: build
    _gpus_of("10.3", monkeypatch)
    why = gpu_architectures.why_not_built_for(jax.devices())
    assert why == (
        "on cpu (compute capability 10.3) the kernels do not run, which were built for 90a-real, "
        "100a-real: install again with pip install . -C cmake.define.JAX_EP_CUDA_ARCHS=103-real"
    )
    monkeypatch.setattr(info, "_gpus", jax.devices)
    report = info.report()
    assert re.search(r"devices \(cpu\) +\d+ x cpu, compute capability 10\.3", report), report
    row = rf"ffi on CUDA +not available +{re.escape(why)} \(CUDA 13\.0, kernels for 90a-real"
    assert re.search(row, report), report


def test_devices_that_do_not_say_what_they_are_are_left_to_cuda(fake):
    assert not hasattr(jax.devices()[0], "compute_capability")
    assert gpu_architectures.why_not_built_for(jax.devices()) is None
    assert not fake.log


@pytest.mark.skipif(
    importlib.util.find_spec("jax_ep._cuda") is None, reason="built without the CUDA kernels"
)
def test_the_compiled_module_says_what_it_was_built_for():
    from jax_ep import _cuda

    build = _cuda.build_info()
    assert build.keys() == fake_cuda.FakeCuda().build_info().keys()
    assert 99 * 1024 < build["shared_memory"] <= 227 * 1024
    built = gpu_architectures.architectures()
    assert any(serves(a, capability) for a in built for capability in KNOWN), built
