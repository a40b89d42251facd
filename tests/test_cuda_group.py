# SPDX-License-Identifier: Apache-2.0
"""EpGroup on GPUs, with a stand-in for the compiled module: sizes, order of steps, failures."""

import inspect
import logging
import pathlib
import re
import sys

import jax
import numpy as np
import pytest

import jax_ep
from ep_testing import fake_cuda
from ep_testing.programs import make_mesh
from jax_ep._src import info, limits, quantized, ranges
from jax_ep._src.groups import backend_choice, group, native
from jax_ep._src.groups.placements import placements

ROOT = pathlib.Path(__file__).resolve().parents[1]
needs_sources = pytest.mark.skipif(
    not (ROOT / "csrc").is_dir(), reason="the C++ sources are not here"
)
CONFIG = jax_ep.EpConfig(num_experts=8, num_topk=2, hidden=16, max_tokens_per_rank=4)
LOAD_CUDA = native._try_load_cuda.__wrapped__  # neither cached nor replaced
CONNECTS = [("connect", 0, 0), ("connect", 0, 1), ("connect", 1, 0), ("connect", 1, 1)]


@pytest.fixture
def fake(monkeypatch):
    return fake_cuda.install(monkeypatch)


@pytest.fixture
def mesh():
    return make_mesh((2, 2), ("data", "expert"))


def _config(**changes):
    sizes = {"num_experts": 8, "num_topk": 2, "hidden": 16, "max_tokens_per_rank": 4}
    return jax_ep.EpConfig(**{**sizes, **changes})


def test_steps_of_a_life(mesh, fake):
    with jax_ep.EpGroup(mesh, "expert", CONFIG, timeout=7.5) as made:
        assert (made.backend, made.platform) == ("ffi", "cuda")
        assert made.heap_bytes == 2 * 4 * 16 * 2
        held = fake.groups[made.group_id]
        assert (held["name"], held["deadlines"]) == (made.name, (3.75, 7.5))
        assert held["ranks"] == [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)]
        assert len(held["mapped"]) == 4
    made.close()
    assert fake.log == [
        ("register", "jax_ep_plan"), ("create", 0, -1), *CONNECTS, ("disconnect",), ("close",),
    ]  # fmt: skip
    assert not fake.groups
    assert not fake.left


def test_targets_are_registered_once(mesh, fake):
    for _ in range(2):
        jax_ep.EpGroup(mesh, "expert", CONFIG).close()
    assert [entry for entry in fake.log if entry[0] == "register"] == [("register", "jax_ep_plan")]


def test_groups_have_nonces_of_their_own(mesh, fake):
    with (
        jax_ep.EpGroup(mesh, "expert", CONFIG) as one,
        jax_ep.EpGroup(mesh, "expert", CONFIG) as other,
    ):
        assert fake.groups[one.group_id]["nonce"] != fake.groups[other.group_id]["nonce"]


@pytest.mark.parametrize(
    ("sms", "passed"),
    [({}, (0, -1)), ({"max_num_sms": 24}, (24, -1)), ({"tail_num_sms": 0}, (0, 0))],
)
def test_numbers_of_sms_reach_the_kernels(sms, passed, mesh, fake):
    jax_ep.EpGroup(mesh, "expert", _config(**sms)).close()
    assert ("create", *passed) in fake.log


def test_a_rank_is_a_place_in_the_mesh_and_not_a_device_number():
    mesh = make_mesh((2, 3), ("expert", "data"), order=[5, 4, 3, 2, 1, 0])
    by_group = {
        (place.group_index, place.rank): device.id
        for place, device in zip(placements(mesh, ("expert",)), mesh.devices.T.flat, strict=True)
    }
    assert by_group == {(0, 0): 5, (0, 1): 2, (1, 0): 4, (1, 1): 1, (2, 0): 3, (2, 1): 0}


def test_ranks_of_several_axes_are_counted_in_the_order_of_the_axes():
    devices = np.array(
        [
            type("Device", (), {"process_index": 3, "id": 9 + i, "local_hardware_id": i})()
            for i in range(8)
        ]
    ).reshape(2, 2, 2)
    mesh = type("Mesh", (), {})()
    mesh.devices, mesh.axis_names = devices, ("a", "b", "c")
    mesh.shape = dict(zip(mesh.axis_names, devices.shape, strict=True))
    places = {(p.group_index, p.rank): p for p in placements(mesh, ("c", "a"))}
    for (a, b, c), device in np.ndenumerate(devices):
        assert places[b, 2 * c + a] == (3, device.id, device.local_hardware_id, b, 2 * c + a)


# --- what cannot be served ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_topk": 33, "num_experts": 64},
            "EpConfig.num_topk is 33; on GPUs it may be at most 32",
        ),
        ({"num_experts": 8192}, "EpConfig.num_experts is 8192; on GPUs it may be at most 4096"),
        (
            {"max_tokens_per_rank": 2**20 + 1},
            "EpConfig.max_tokens_per_rank is 1048577; on GPUs it may be at most 1048576",
        ),
    ],
)
def test_a_size_past_the_kernels_limits_is_named(changes, message, mesh, fake):
    with pytest.raises(jax_ep.EpUnavailable, match=re.escape(message)):
        jax_ep.EpGroup(mesh, "expert", _config(**changes), backend="ffi")
    with jax_ep.EpGroup(mesh, "expert", _config(**changes)) as made:
        assert made.backend == "xla"
    assert not fake.log


@needs_sources
def test_limits_are_those_of_the_kernels():
    headers = ("limits.h", "low_latency_protocol.h")
    text = "".join((ROOT / "csrc" / "core" / header).read_text() for header in headers)

    def constant(name):
        value = re.search(rf"constexpr int\w+ {name} = ([^;]+);", text)[1]
        return eval(value.replace("int64_t{1}", "1"))

    assert constant("kMaxRanks") == limits.MAX_RANKS
    assert constant("kMaxTopk") == limits.MAX_TOPK
    assert constant("kMaxExperts") == limits.MAX_EXPERTS
    assert constant("kMaxTokens") == limits.MAX_TOKENS_PER_RANK
    assert constant("kMaxLowLatencyTokens") == limits.MAX_LOW_LATENCY_TOKENS
    assert constant("kMaxLowLatencySelections") == limits.MAX_LOW_LATENCY_SELECTIONS
    assert constant("kMaxLowLatencyBins") == limits.MAX_LOW_LATENCY_BINS
    why = ranges.why_not_on_gpus(_config(num_experts=128), 128)
    assert why == "the group has 128 ranks; on GPUs it may have at most 64"
    for domain_size in (None, 1, 2, 4):
        assert ranges.why_not_on_gpus(_config(domain_size=domain_size), 4) is None


@needs_sources
def test_fp8_scales_are_those_of_the_kernels():
    text = (ROOT / "csrc" / "core" / "dtype.h").read_text()

    def constant(name):
        return float(re.search(rf"constexpr \w+ {name} = ([\d.e-]+)F?;", text)[1])

    assert constant("kScaleBlock") == quantized.SCALE_BLOCK
    assert constant("kMaxFloat8") == quantized._MAX
    assert constant("kMinAmax") == quantized._MIN_AMAX


@needs_sources
def test_the_stand_in_takes_what_the_compiled_module_takes():
    text = (ROOT / "xla_ffi" / "cuda" / "module.cc").read_text()

    def names(function):
        start = text.index(f'"{function}",')
        return set(re.findall(r'nb::arg\("(\w+)"\)', text[start : text.index("\n  m.", start)]))

    parameters = inspect.signature(fake_cuda.FakeCuda.create_group).parameters
    assert names("create_group") == set(parameters) - {"self"}
    sizes = set(re.findall(r'HeapSize\{"(\w+)",', text))
    assert sizes == set(inspect.signature(fake_cuda.FakeCuda.HeapShape).parameters)
    for function in ("connect_group", "disconnect_group", "close_group"):
        taken = inspect.signature(getattr(fake_cuda.FakeCuda, function)).parameters
        assert names(function) == set(taken) - {"self"}, function


def test_without_the_cuda_module_groups_on_gpus_fall_back_with_the_reason(
    mesh, fake, monkeypatch, caplog
):
    monkeypatch.setattr(native, "_try_load_cuda", LOAD_CUDA)
    monkeypatch.setitem(sys.modules, "jax_ep._cuda", None)
    monkeypatch.setattr(backend_choice, "_logged", set())
    with (
        caplog.at_level(logging.WARNING, logger="jax_ep"),
        jax_ep.EpGroup(mesh, "expert", CONFIG) as made,
    ):
        assert (made.backend, made.heap_bytes) == ("xla", 0)
    assert "was built without CUDA" in caplog.text
    with pytest.raises(jax_ep.EpUnavailable, match="JAX_EP_CUDA=ON pip install"):
        jax_ep.EpGroup(mesh, "expert", CONFIG, backend="ffi")


def test_other_platforms_have_no_kernels(mesh, monkeypatch):
    monkeypatch.setattr(group, "_platform", lambda mesh: "tpu")
    with pytest.raises(jax_ep.EpUnavailable, match="it has no kernels for platform tpu"):
        jax_ep.EpGroup(mesh, "expert", CONFIG, backend="ffi")


# --- failures ----------------------------------------------------------------------------------


def test_a_heap_that_does_not_fit_is_an_error_that_says_what_to_lower(mesh, fake):
    text = "the heap needs 3.5 GiB, of which rows 3.4 GiB; lower max_tokens_per_rank (4096)"
    fake.refuse["create"] = MemoryError(text)
    with pytest.raises(jax_ep.EpUnavailable, match=re.escape(text)) as caught:
        jax_ep.EpGroup(mesh, "expert", CONFIG)
    assert "cannot serve EpGroup" in str(caught.value)
    assert fake.log == [("register", "jax_ep_plan"), ("create", 0, -1)]


def test_a_peer_that_cannot_be_mapped_leaves_nothing_behind(mesh, fake):
    fake.refuse["connect"] = RuntimeError("GPUs 0 and 1 do not reach each other")
    with pytest.raises(jax_ep.EpUnavailable, match=r"rank 0 .*GPUs 0 and 1 do not reach"):
        jax_ep.EpGroup(mesh, "expert", CONFIG)
    assert fake.log[2:] == [("connect", 0, 0), ("disconnect",), ("close",)]
    assert not fake.groups


def test_a_context_that_is_lost_does_not_keep_close_from_freeing(mesh, fake, caplog):
    made = jax_ep.EpGroup(mesh, "expert", CONFIG)
    fake.refuse["disconnect"] = RuntimeError("unspecified launch failure")
    with caplog.at_level(logging.ERROR, logger="jax_ep"):
        made.close()
    assert "cannot unmap its peers' memory: unspecified launch failure" in caplog.text
    assert not fake.groups


def test_close_waits_for_results_before_it_unmaps(mesh, fake, monkeypatch):
    made = jax_ep.EpGroup(mesh, "expert", CONFIG)
    monkeypatch.setattr(group, "_wait_for_results", lambda devices: fake.log.append(("wait",)))
    made.close()
    assert fake.log[-3:] == [("wait",), ("disconnect",), ("close",)]


def test_info_has_a_row_for_cuda(fake):
    report = info.report()
    assert re.search(r"ffi on CUDA +built +.*CUDA 13\.0.*90-real, 100-real", report), report
    assert jax.default_backend() == "cpu"
