# SPDX-License-Identifier: Apache-2.0
"""The domains of a group on GPUs: ranks that map each other's memory, as those of one host do.

Between domains there is a network. So that what several hosts do can be tried on one,
`JAX_EP_NODE_RANKS=2` makes a domain of every two ranks of a host; mapped memory joins them, or with
`JAX_EP_NODE_TRANSPORT=rdma`, NVSHMEM (docs/guide/multi_node.md). `JAX_EP_NODE_PLAN` chooses the
kind of plan, which else depends on how many domains there are.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jax_ep._src.groups.interface import GroupParameters
from jax_ep._src.groups.placements import Placement

SIZE_VARIABLE = "JAX_EP_NODE_RANKS"
TRANSPORT_VARIABLE = "JAX_EP_NODE_TRANSPORT"
MAX_DOMAIN_RANKS = 32  # kMaxDomainRanks of the kernels
PLAN_VARIABLE = "JAX_EP_NODE_PLAN"
_TRANSPORTS = ("loopback", "rdma")
_PLANS = ("auto", "routing", "counts")


class Domains(NamedTuple):
    """How the ranks of a group fall into domains.

    Attributes:
        size: ranks of each, which follow each other.
        use_rdma: whether NVSHMEM joins them, and not mapped memory.
    """

    size: int
    use_rdma: bool


def emulation() -> str:
    """What the variables say, for who compares processes; empty if they are not set.

    Raises:
        ValueError: a value that is not allowed.
    """
    size, transport, plan = _emulated_size(), _emulated_transport(), _plan()
    text = "" if plan == _PLANS[0] else f", {PLAN_VARIABLE}={plan}"
    if size is not None:
        text += f", {SIZE_VARIABLE}={size}, {TRANSPORT_VARIABLE}={transport}"
    return text


def gathered_domains(num_ranks: int) -> int:
    """Among how many domains at most plans gather the routing of all ranks; 0: the kernels choose.

    Raises:
        ValueError: a value of `JAX_EP_NODE_PLAN` that is not allowed.
    """
    return {"auto": 0, "routing": num_ranks, "counts": 1}[_plan()]


def _emulated_size() -> int | None:
    text = os.environ.get(SIZE_VARIABLE, "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(
            f"{SIZE_VARIABLE} is {text!r}; allowed: how many ranks are to be a domain, 1 or more"
        )
    return int(text)


def _emulated_transport() -> str:
    transport = os.environ.get(TRANSPORT_VARIABLE, "") or _TRANSPORTS[0]
    if transport not in _TRANSPORTS:
        raise ValueError(
            f"{TRANSPORT_VARIABLE} is {transport!r}; allowed: {', '.join(_TRANSPORTS)}"
        )
    return transport


def _plan() -> str:
    plan = os.environ.get(PLAN_VARIABLE, "") or _PLANS[0]
    if plan not in _PLANS:
        raise ValueError(f"{PLAN_VARIABLE} is {plan!r}; allowed: {', '.join(_PLANS)}")
    return plan


def find_domains(
    parameters: GroupParameters, hosts: Mapping[int, str], ranks: Sequence[Placement]
) -> tuple[Domains, str | None]:
    """The domains of a group's ranks, and why the kernels cannot serve them; None if they can.

    Args:
        parameters: of the group.
        hosts: by process, where it runs.
        ranks: those of all of the mesh's groups.
    """
    num_ranks = parameters.num_ranks
    by_group: dict[int, list[str]] = {}
    for rank in sorted(ranks, key=lambda rank: (rank.group_index, rank.rank)):
        by_group.setdefault(rank.group_index, []).append(hosts[rank.process])
    if all(len(set(of_group)) == 1 for of_group in by_group.values()):
        size = min(_emulated_size() or num_ranks, num_ranks)
        found = Domains(size, size < num_ranks and _emulated_transport() == "rdma")
        if num_ranks % size:
            why_not = f"{SIZE_VARIABLE} is {size}; it must divide the group's {num_ranks} ranks"
            return found, why_not
    else:
        size = max(of_group.count(of_group[0]) for of_group in by_group.values())
        found = Domains(size, use_rdma=True)
        if why_not := _why_not_in_blocks(by_group, size):
            return found, why_not
    return found, _why_not_served(parameters, size)


def _why_not_in_blocks(by_group: Mapping[int, Sequence[str]], size: int) -> str | None:
    """Why ranks on these hosts are no domains of `size` ranks that follow each other."""
    for group_index, hosts in by_group.items():
        blocks = [hosts[first : first + size] for first in range(0, len(hosts), size)]
        each_on_one = all(len(set(block)) == 1 for block in blocks)
        if not each_on_one or len({block[0] for block in blocks}) * size != len(hosts):
            numbers = {host: i for i, host in enumerate(dict.fromkeys(hosts))}
            where = ", ".join(str(numbers[host]) for host in hosts)
            return (
                f"its ranks are on several hosts, and not equally many neighboring ones on each "
                f"(hosts of the ranks of group_index {group_index}: {where}): make the mesh so "
                "that the axis inside a host comes last"
            )
    return None


def _why_not_served(parameters: GroupParameters, size: int) -> str | None:
    asked = parameters.config.domain_size
    if size == parameters.num_ranks:
        return None
    if size > MAX_DOMAIN_RANKS:
        return f"its domains have {size} ranks; on GPUs they may have at most {MAX_DOMAIN_RANKS}"
    if asked not in (None, size):
        return (
            f"EpConfig.domain_size is {asked}, and sums between domains are those of the {size} "
            "ranks of each; leave it out, or choose that"
        )
    return None
