# SPDX-License-Identifier: Apache-2.0
"""The domains of a group on GPUs: ranks that map each other's memory, as those of one host do.

Between domains there is a network. `JAX_EP_NODE_RANKS=2` makes a domain of every two ranks of a
host, which mapped memory then joins as if it were a network (docs/design/internode.md): so what
several hosts do can be tried on one.
"""

import os
from collections.abc import Mapping, Sequence

from jax_ep._src.groups.interface import GroupParameters
from jax_ep._src.groups.placements import Placement

NODE_RANKS_VARIABLE = "JAX_EP_NODE_RANKS"
MAX_DOMAIN_RANKS = 32  # kMaxDomainRanks of the kernels


def emulated_domain_size() -> int | None:
    """What JAX_EP_NODE_RANKS says; None if it is not set.

    Raises:
        ValueError: it is no number above 0.
    """
    text = os.environ.get(NODE_RANKS_VARIABLE, "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(
            f"{NODE_RANKS_VARIABLE} is {text!r}; allowed: how many ranks are to be a domain, 1 or "
            "more"
        )
    return int(text)


def domain_size_of(num_ranks: int) -> int:
    """Ranks of a domain, of a group whose ranks are on one host."""
    return min(emulated_domain_size() or num_ranks, num_ranks)


def why_not_emulated(parameters: GroupParameters) -> str | None:
    """Why the kernels cannot serve domains of JAX_EP_NODE_RANKS ranks; None if they can."""
    num_ranks = parameters.num_ranks
    size = domain_size_of(num_ranks)
    if num_ranks % size:
        return f"{NODE_RANKS_VARIABLE} is {size}; it must divide the group's {num_ranks} ranks"
    return why_not_served(parameters, size)


def why_not_served(parameters: GroupParameters, size: int) -> str | None:
    """Why the kernels cannot serve domains of `size` ranks; None if they can."""
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


def why_not_one_host(hosts: Mapping[int, str], ranks: Sequence[Placement]) -> str | None:
    """Why the ranks of a group cannot map each other's memory; None if they can.

    Args:
        hosts: by process, where it runs.
        ranks: those of all of the mesh's groups.
    """
    processes: dict[int, dict[str, int]] = {}  # group_index -> host -> one of its processes
    for rank in ranks:
        of_group = processes.setdefault(rank.group_index, {})
        of_group.setdefault(hosts[rank.process], rank.process)
    for group_index, by_host in processes.items():
        if len(by_host) > 1:
            where = " and ".join(map(str, by_host.values()))
            return (
                f"its ranks are on several hosts (processes {where}, group_index {group_index}), "
                "and the kernels reach over the NVLink of one: choose axes inside a host"
            )
    return None
