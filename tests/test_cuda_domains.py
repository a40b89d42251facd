# SPDX-License-Identifier: Apache-2.0
"""Groups on GPUs that span domains: what makes them, and how their calls are launched."""

import dataclasses
import logging
import pathlib
import re
from typing import NamedTuple

import numpy as np
import pytest

import jax_ep
from ep_testing import fake_cuda, fake_cudart
from ep_testing.cuda_calls import Sizes, buffers, call, refusal
from ep_testing.programs import make_mesh
from jax_ep._src.groups import backend_choice, domains
from jax_ep._src.groups.group import backend_group
from jax_ep._src.groups.placements import Placement

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIZES = {"num_experts": 8, "num_topk": 2, "hidden": 16, "max_tokens_per_rank": 4}


@pytest.fixture
def fake(monkeypatch):
    return fake_cuda.install(monkeypatch)


@pytest.fixture
def mesh():
    return make_mesh((2, 4), ("data", "expert"))


def _config(**changes):
    return jax_ep.EpConfig(**{**SIZES, **changes})


def test_every_so_many_ranks_are_a_domain(mesh, fake, monkeypatch):
    monkeypatch.setenv("JAX_EP_NODE_RANKS", "2")
    with jax_ep.EpGroup(mesh, "expert", _config()) as made:
        assert (made.backend, made.domain_size) == ("ffi", 2)
        heap = fake.groups[made.group_id]["heap"]
        assert (heap.num_ranks, heap.num_neighbors) == (4, 2)


@pytest.mark.parametrize("ranks", ["", "4", "8"])
def test_ranks_of_one_domain_have_no_network(ranks, mesh, fake, monkeypatch):
    monkeypatch.setenv("JAX_EP_NODE_RANKS", ranks)
    for asked, is_made in ((None, 4), (2, 2)):
        with jax_ep.EpGroup(mesh, "expert", _config(domain_size=asked)) as made:
            assert made.domain_size == is_made
            assert fake.groups[made.group_id]["heap"].num_neighbors == 0


def test_low_latency_calls_have_halves_within_one_domain_alone(mesh, fake, monkeypatch):
    config = _config(low_latency_tokens=4)
    for of_domain, has_halves in (("", True), ("2", False)):
        monkeypatch.setenv("JAX_EP_NODE_RANKS", of_domain)
        with jax_ep.EpGroup(mesh, "expert", config) as made:
            assert fake.groups[made.group_id]["heap"].low_latency_tokens == 4
            assert backend_group(made).dispatches_in_halves(4, quantized=False) == has_halves
            assert backend_group(made).combines_in_halves(4) == has_halves


@pytest.mark.parametrize(
    ("variable", "changes", "message"),
    [
        ("3", {}, "JAX_EP_NODE_RANKS is 3; it must divide the group's 4 ranks"),
        (
            "2",
            {"domain_size": 4},
            "EpConfig.domain_size is 4, and sums between domains are those of the 2 ranks of each",
        ),
    ],
)
def test_what_cannot_be_served_is_named(
    variable, changes, message, mesh, fake, monkeypatch, caplog
):
    monkeypatch.setenv("JAX_EP_NODE_RANKS", variable)
    monkeypatch.setattr(backend_choice, "_logged", set())
    with pytest.raises(jax_ep.EpUnavailable, match=re.escape(message)):
        jax_ep.EpGroup(mesh, "expert", _config(**changes), backend="ffi")
    with (
        caplog.at_level(logging.WARNING, logger="jax_ep"),
        jax_ep.EpGroup(mesh, "expert", _config(**changes)) as made,
    ):
        assert made.backend == "xla"
        assert made.domain_size == changes.get("domain_size", 4)
    assert message in caplog.text
    assert not fake.log


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_variable_that_is_no_number_is_an_error(text, mesh, fake, monkeypatch):
    monkeypatch.setenv("JAX_EP_NODE_RANKS", text)
    with pytest.raises(ValueError, match=f"JAX_EP_NODE_RANKS is '{re.escape(text)}'; allowed: "):
        jax_ep.EpGroup(mesh, "expert", _config())
    assert not fake.log


def test_a_variable_that_does_not_say_whether_to_end_is_an_error(mesh, fake, monkeypatch):
    monkeypatch.setenv("JAX_EP_ABORT", "always")
    with pytest.raises(ValueError, match="JAX_EP_ABORT is 'always'; allowed: 0, 1"):
        jax_ep.EpGroup(mesh, "expert", _config())
    assert not fake.log


@pytest.mark.parametrize(
    ("plan", "gathered"), [("", 0), ("auto", 0), ("routing", 4), ("counts", 1)]
)
def test_a_variable_chooses_the_kind_of_plan(plan, gathered, mesh, fake, monkeypatch):
    monkeypatch.setenv("JAX_EP_NODE_RANKS", "2")
    monkeypatch.setenv("JAX_EP_NODE_PLAN", plan)
    with jax_ep.EpGroup(mesh, "expert", _config()) as made:
        assert fake.groups[made.group_id]["heap"].gathered_domains == gathered


def test_a_kind_of_plan_that_there_is_not_is_an_error(mesh, fake, monkeypatch):
    monkeypatch.setenv("JAX_EP_NODE_PLAN", "rails")
    message = "JAX_EP_NODE_PLAN is 'rails'; allowed: auto, routing, counts"
    with pytest.raises(ValueError, match=message):
        jax_ep.EpGroup(mesh, "expert", _config())
    assert not fake.log


def test_processes_tell_each_other_what_the_variables_say(monkeypatch):
    assert domains.emulation() == ""
    monkeypatch.setenv("JAX_EP_NODE_PLAN", "counts")
    assert domains.emulation() == ", JAX_EP_NODE_PLAN=counts"
    monkeypatch.setenv("JAX_EP_NODE_RANKS", "2")
    assert domains.emulation() == (
        ", JAX_EP_NODE_PLAN=counts, JAX_EP_NODE_RANKS=2, JAX_EP_NODE_TRANSPORT=loopback"
    )


def test_large_domains_are_past_the_kernels_limits(fake):
    limits = (ROOT / "csrc" / "core" / "network_layout.h").read_text()
    assert f"kMaxDomainRanks = {domains.MAX_DOMAIN_RANKS};" in limits


class _Parameters(NamedTuple):
    num_ranks: int
    config: jax_ep.EpConfig = jax_ep.EpConfig(**SIZES)


def _find(*hosts, groups=1):
    """Domains of ranks on these hosts, a process each; `groups` of them, one after the other."""
    num_ranks = len(hosts) // groups
    ranks = [Placement(p, p, 0, p // num_ranks, p % num_ranks) for p in range(len(hosts))]
    return domains.find_domains(_Parameters(num_ranks), dict(enumerate(hosts)), ranks)


def test_a_host_is_a_domain():
    assert _find(*"aaaa") == (domains.Domains(4, use_rdma=False), None)
    assert _find(*"aabb") == (domains.Domains(2, use_rdma=True), None)
    assert _find(*"abcd") == (domains.Domains(1, use_rdma=True), None)
    assert _find(*"aabb", groups=2) == (domains.Domains(2, use_rdma=False), None)
    assert _find(*"aabbccdd", groups=2) == (domains.Domains(2, use_rdma=True), None)


def test_hosts_emulated_on_one_may_be_joined_by_nvshmem(monkeypatch):
    monkeypatch.setenv("JAX_EP_NODE_RANKS", "2")
    assert _find(*"aaaa") == (domains.Domains(2, use_rdma=False), None)
    monkeypatch.setenv("JAX_EP_NODE_TRANSPORT", "rdma")
    assert _find(*"aaaa") == (domains.Domains(2, use_rdma=True), None)
    assert _find(*"aa") == (domains.Domains(2, use_rdma=False), None)
    monkeypatch.setenv("JAX_EP_NODE_TRANSPORT", "carrier pigeons")
    with pytest.raises(ValueError, match="is 'carrier pigeons'; allowed: loopback, rdma"):
        _find(*"aaaa")


@pytest.mark.parametrize("hosts", ["abab", "aaab", "abba", "aabbb", "aaba"])
def test_ranks_scattered_over_hosts_are_named(hosts):
    _, why_not = _find(*hosts)
    numbers = ", ".join("0" if host == "a" else "1" for host in hosts)
    assert f"(hosts of the ranks of group_index 0: {numbers}): make the mesh so" in why_not


def test_domains_are_not_too_large():
    _, why_not = _find(*("a" * 33 + "b" * 33))
    assert why_not == "its domains have 33 ranks; on GPUs they may have at most 32"


# --- launches, on a fake CUDA runtime ----------------------------------------------------------

R4 = Sizes(num_ranks=4)
OF_DOMAINS = {"domain_size": np.int32(2)}


@pytest.fixture
def runtime(monkeypatch):
    monkeypatch.setenv("JAX_EP_NODE_RANKS", "2")
    fake = fake_cudart.install(monkeypatch, devices=4)
    config = _config(dtype="float32")
    with jax_ep.EpGroup(make_mesh((4,), ("expert",)), "expert", config) as group:
        yield fake, group
    fake.check_clean()


@pytest.mark.parametrize("tokens", [0, R4.num_tokens - 1, R4.num_tokens])
@pytest.mark.parametrize("operation", ["plan", "dispatch", "combine", "plan_dispatch"])
def test_calls_of_few_tokens_are_low_latency_ones(operation, tokens, monkeypatch):
    monkeypatch.setenv("JAX_EP_NODE_RANKS", "2")
    fake = fake_cudart.install(monkeypatch, devices=4)
    config = _config(dtype="float32", low_latency_tokens=tokens)
    attributes = OF_DOMAINS if operation == "combine" else {}
    sizes = dataclasses.replace(R4, scalars=False)
    with jax_ep.EpGroup(make_mesh((4,), ("expert",)), "expert", config) as group:
        arrays = buffers(operation, sizes)
        call(fake, operation, group.group_id, arrays, sizes, device=1, **attributes)
        launched = [line for line in fake.lines("calls") if line.startswith("launch_")]
        launch = fake.launches()[-1]
    serves = tokens == R4.num_tokens and operation in {"combine", "plan_dispatch"}
    assert launch["num_domains"] == 2
    if serves:
        assert launched == ["launch_low_latency_over_loopback"]
        assert (
            launch["warps"] == launch["senders"] == {"plan_dispatch": 12, "combine": 8}[operation]
        )
    else:
        assert launched == ["launch_over_loopback"] * (1 + (operation == "plan_dispatch"))
    fake.check_clean()


@pytest.mark.parametrize("half", ["dispatch_start", "combine_start"])
def test_halves_between_domains_are_refused(half, monkeypatch):
    monkeypatch.setenv("JAX_EP_NODE_RANKS", "2")
    fake = fake_cudart.install(monkeypatch, devices=4)
    config = _config(dtype="float32", low_latency_tokens=R4.num_tokens)
    sizes = dataclasses.replace(R4, scalars=False)
    attributes = OF_DOMAINS if half == "combine_start" else {}
    with jax_ep.EpGroup(make_mesh((4,), ("expert",)), "expert", config) as group:
        message = refusal(fake, half, group.group_id, buffers(half, sizes), sizes, **attributes)
    assert "of a call that has none" in message
    assert fake.launches() == []


@pytest.mark.parametrize("operation", ["plan", "dispatch", "combine", "plan_dispatch"])
def test_calls_are_launched_between_domains(operation, runtime):
    fake, group = runtime
    attributes = OF_DOMAINS if operation == "combine" else {}
    for device in range(4):
        arrays = buffers(operation, R4)
        call(fake, operation, group.group_id, arrays, R4, device=device, **attributes)
    launches = fake.launches()
    assert len(launches) == 4 * (2 if operation == "plan_dispatch" else 1)
    heaps = launches[0]["network_heap"]
    assert len(set(heaps)) == 4
    for launch in launches:
        first = launch["rank"] // 2 * 2
        assert (launch["first_neighbor"], launch["num_neighbors"]) == (first, 2)
        assert launch["num_domains"] == 2
        assert launch["network_heap"] == heaps
        assert launch["domain_heap"] == heaps[first : first + 2]
        assert [heap != 0 for heap in launch["heap"]] == [r // 2 == first // 2 for r in range(4)]


@pytest.mark.parametrize(("plan", "warps"), [("routing", 12), ("counts", 8)])
def test_each_kind_of_plan_has_its_warps(plan, warps, monkeypatch):
    monkeypatch.setenv("JAX_EP_NODE_RANKS", "2")
    monkeypatch.setenv("JAX_EP_NODE_PLAN", plan)
    fake = fake_cudart.install(monkeypatch, devices=4)
    config = _config(dtype="float32")
    with jax_ep.EpGroup(make_mesh((4,), ("expert",)), "expert", config) as group:
        call(fake, "plan", group.group_id, buffers("plan", R4), R4, device=1)
        launch = fake.launches()[-1]
    assert launch["warps"] == warps
    fake.check_clean()


def test_a_combine_of_other_domains_is_refused(runtime):
    fake, group = runtime
    message = refusal(fake, "combine", group.group_id, buffers("combine", R4), R4)
    assert "domain_size is 4; allowed: 2, the ranks of each of the group's domains" in message
    assert fake.launches() == []
