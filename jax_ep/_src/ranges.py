# SPDX-License-Identifier: Apache-2.0
"""Which sizes a group of so many ranks can have."""

from jax_ep._src import limits
from jax_ep._src.config import EpConfig


def check_num_ranks(config: EpConfig, num_ranks: int, axis_name: str | tuple[str, ...]) -> None:
    """Raises unless a config fits a number of ranks, on any backend.

    Raises:
        ValueError: it does not; the message names what is too large, and what to change.
    """
    if config.num_experts % num_ranks and not config.pad_experts:
        raise ValueError(
            f"EpConfig.num_experts is {config.num_experts}; it must be a multiple of the "
            f"group's {num_ranks} ranks (axis {axis_name!r} of the mesh), or EpConfig.pad_experts "
            "be True"
        )
    if num_ranks % (config.domain_size or 1):
        raise ValueError(
            f"EpConfig.domain_size is {config.domain_size}; it must divide the group's {num_ranks} "
            f"ranks (axis {axis_name!r} of the mesh)"
        )
    recv_capacity = config.capacity(num_ranks=num_ranks, num_tokens=config.max_tokens_per_rank)
    if recv_capacity > limits.INT32_MAX:
        raise ValueError(
            f"the receive buffer would have {recv_capacity} rows; at most {limits.INT32_MAX} "
            "are supported: set EpConfig.recv_capacity (see with_capacity_factor) or lower "
            "max_tokens_per_rank"
        )
    _check_low_latency_tokens(config, num_ranks)


def _check_low_latency_tokens(config: EpConfig, num_ranks: int) -> None:
    """Raises where heaps would get room for calls that low-latency kernels cannot serve."""
    if not config.low_latency_tokens:
        return
    most = most_low_latency_tokens(config, num_ranks)
    if config.low_latency_tokens > most:
        raise ValueError(
            f"EpConfig.low_latency_tokens is {config.low_latency_tokens}; with {num_ranks} ranks, "
            f"num_topk {config.num_topk} and num_experts {config.num_experts} at most {most} are "
            "supported"
        )


def most_low_latency_tokens(config: EpConfig, num_ranks: int) -> int:
    """The largest `T` of calls that low-latency kernels serve, however many tokens a rank has."""
    bins = num_ranks * config.num_local_experts(num_ranks=num_ranks)
    bins += num_ranks if config.layout == "rank" else 0
    if bins > limits.MAX_LOW_LATENCY_BINS:
        return 0
    return limits.MAX_LOW_LATENCY_SELECTIONS // (num_ranks * config.num_topk)


def why_not_on_gpus(config: EpConfig, num_ranks: int) -> str | None:
    """Which size the kernels for GPUs cannot serve; None if they can serve all."""
    num_experts = num_ranks * config.num_local_experts(num_ranks=num_ranks)
    for field, value, maximum in (
        ("num_topk", config.num_topk, limits.MAX_TOPK),
        ("num_experts", num_experts, limits.MAX_EXPERTS),
        ("max_tokens_per_rank", config.max_tokens_per_rank, limits.MAX_TOKENS_PER_RANK),
    ):
        if value > maximum:
            padded = f", {value} with pad_experts" if value != getattr(config, field) else ""
            return (
                f"EpConfig.{field} is {getattr(config, field)}{padded}; on GPUs it may be at most "
                f"{maximum}"
            )
    if num_ranks > limits.MAX_RANKS:
        return f"the group has {num_ranks} ranks; on GPUs it may have at most {limits.MAX_RANKS}"
    return None
