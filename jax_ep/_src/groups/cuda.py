# SPDX-License-Identifier: Apache-2.0
"""A group's memory on GPUs: made in every process, mapped by its peers, and given back.

All processes of a mesh agree on the backend before any memory is allocated.
"""

import atexit
import contextlib
import dataclasses
import functools
import logging
import math
import os
import pathlib
import platform
import time
from collections.abc import Sequence
from typing import Any

import jax

from jax_ep._src.config import EpConfig
from jax_ep._src.errors import EpUnavailable
from jax_ep._src.groups import domains, gpu_architectures, native, rdma
from jax_ep._src.groups.bootstrap import Bootstrap, Message, mesh_digest, next_group_id, num_made
from jax_ep._src.groups.far_failures import FarFailures
from jax_ep._src.groups.health import EpHealth
from jax_ep._src.groups.interface import GroupParameters, Offer
from jax_ep._src.groups.kernel_errors import GroupWatch, Watch
from jax_ep._src.groups.placements import Placement, placements
from jax_ep._src.groups.stuck_kernels import StuckKernels, aborts
from jax_ep._src.limits import DTYPES, LAYOUTS
from jax_ep._src.ranges import why_not_on_gpus
from jax_ep._src.tuning.launches import Tuning, as_native
from jax_ep._src.tuning.lookup import agreed, resolve

_logger = logging.getLogger("jax_ep")

# How long close() waits for other processes, at most: what they may still map is then left.
_CLOSE_S = 60.0
_EXIT_S = 10.0


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What the processes of a mesh have agreed on before anything is allocated.

    Attributes:
        bootstrap: for what they tell each other from here on.
        nonce: a number that they alone know of.
        group_id: of the group, the same in all of them.
        why_not: why the kernels cannot serve the group, in one of them; None if they can.
        domains: into which the ranks fall.
        hosts: text by process: where it runs.
        tuning: what this process found, with what the ranks share as rank 0 has it.
    """

    bootstrap: Bootstrap
    nonce: int
    group_id: int
    why_not: str | None
    domains: domains.Domains
    hosts: dict[int, str]
    tuning: Tuning


def offer(parameters: GroupParameters) -> Offer:
    """Meets the other processes of a mesh of GPUs, so that all of them choose the same backend.

    Raises:
        EpUnavailable: a process did not come, or makes a group with another config.
    """
    agreement = agree(parameters, why_not(parameters))
    return Offer(
        why_not=agreement.why_not or _why_not_masking(parameters, agreement),
        make=functools.partial(CudaGroup, parameters=parameters, agreement=agreement),
    )


def why_not(parameters: GroupParameters) -> str | None:
    """Why the kernels cannot serve the group in this process; None if they can."""
    return (
        native.why_no_cuda()
        or why_not_on_gpus(parameters.config, parameters.num_ranks)
        or gpu_architectures.why_not_built_for(parameters.mesh.devices.flat)
    )


def _why_not_masking(parameters: GroupParameters, agreement: Agreement) -> str | None:
    """Why the group cannot go on without ranks that do not come; None if it can, or need not.

    The same in all processes: of what they have agreed on.
    """
    if parameters.on_timeout != "mask":
        return None
    config, num_ranks = parameters.config, parameters.num_ranks
    if agreement.domains.size < num_ranks:
        return (
            "with on_timeout 'mask' its ranks must be in one domain, as those of one host are, and "
            f"these are in domains of {agreement.domains.size}"
        )
    tokens = agreement.tuning.low_latency_tokens  # None where the config has a number
    if tokens is None:
        tokens = config.low_latency_tokens
    if not tokens:
        return (
            "with on_timeout 'mask' the low-latency kernels go on without missing ranks, and they "
            f"serve no calls: EpConfig.low_latency_tokens is {tokens}; allowed: at least 1"
        )
    module, heap = native.load_cuda(), _heap(parameters, agreement)
    fp8_rows = config.recv_dtype is not None
    if not module.dispatch_is_low_latency(
        heap, num_tokens=tokens, fp8_x=False, fp8_rows=fp8_rows
    ) or not module.combine_is_low_latency(
        heap, num_tokens=tokens, domain_size=parameters.domain_size
    ):
        return (
            "with on_timeout 'mask' the low-latency kernels go on without missing ranks, and they "
            f"do not serve calls of {tokens} tokens of this config: rows must be a multiple of 16 "
            "bytes in all formats, and EpConfig.domain_size None, 1 or the number of ranks"
        )
    return None


def agree(parameters: GroupParameters, local_why_not: str | None) -> Agreement:
    """What all processes of the mesh say; `local_why_not` is what this one does.

    Raises:
        EpUnavailable: a process did not come, or makes a group with another config.
    """
    mesh, axis_names = parameters.mesh, parameters.axis_names
    warn_after, timeout = parameters.warn_after, parameters.timeout
    ranks = placements(mesh, axis_names)
    processes = sorted({rank.process for rank in ranks})
    process_index = jax.process_index()
    digest = mesh_digest(mesh, axis_names)
    kind = mesh.devices.flat[0].device_kind
    resolved = resolve(parameters.tuning, parameters.config, parameters.num_ranks, kind)
    boot = Bootstrap(digest, processes, process_index, warn_after=warn_after, timeout=timeout)
    with boot.telling_failures("join"):
        nonce = boot.begin()
        own = {
            "made": num_made(digest),
            "host": host(),
            "where": f"process {process_index} (pid {os.getpid()} on {platform.node()})",
            "config": f"{parameters.config}, warn_after={warn_after:g}, timeout={timeout:g}"
            + (", on_timeout='mask'" if parameters.on_timeout == "mask" else "")
            + domains.emulation(),
            "aborts": aborts(),  # here: all are told of a value that is not allowed
            "why_not": local_why_not,
            "why_no_rdma": rdma.why_unavailable(),
            "low_latency_tokens": resolved.tuning.low_latency_tokens,
            "untuned": resolved.missing,
        }
        messages = boot.gather("join", own)
        boot.all_have_begun()
    _check_messages(messages, own)
    found, why_not = domains.find_domains(
        parameters, {p: m["host"] for p, m in messages.items()}, ranks
    )
    return Agreement(
        bootstrap=boot,
        nonce=nonce,
        group_id=next_group_id(digest, after=max(m["made"] for m in messages.values())),
        why_not=_why_not_all(messages, "why_not")
        or why_not
        or (_why_no_rdma(messages, ranks) if found.use_rdma else None),
        domains=found,
        hosts={process: message["where"] for process, message in messages.items()},
        tuning=Tuning()  # nothing is tuned between domains
        if found.size < parameters.num_ranks
        else agreed(
            resolved.tuning,
            parameters.config,
            parameters.num_ranks,
            rank_0=messages[ranks[0].process]["low_latency_tokens"],
        ),
    )


def _check_messages(messages: dict[int, Message], own: Message) -> None:
    """Raises where processes cannot make a group together, or one of them has no table."""
    for process, message in sorted(messages.items()):
        if message["config"] != own["config"]:
            raise EpUnavailable(
                f"process {process} made it with another config: {message['config']}; here it is "
                f"{own['config']}"
            )
    if untuned := _why_not_all(messages, "untuned"):
        raise EpUnavailable(f"tuning is 'require', and {untuned}")


def _why_not_all(messages: dict[int, Message], key: str) -> str | None:
    for process, message in sorted(messages.items()):
        if message[key] is not None:
            where = f"in process {process}, " if len(messages) > 1 else ""
            return f"{where}{message[key]}"
    return None


def _why_no_rdma(messages: dict[int, Message], ranks: Sequence[Placement]) -> str | None:
    why_not = _why_not_all(messages, "why_no_rdma") or rdma.why_not_one_gpu_each(
        ranks, jax.process_count()
    )
    return why_not and f"its ranks are on several hosts, and {why_not}"


class CudaGroup:
    """A `BackendGroup` in the compiled module, with the heaps of the ranks on this process's GPUs.

    Attributes:
        group_id: the group's id in the compiled module.
        heap_bytes: bytes of each rank's heap, and of its network heap.
        domain_size: that of the config, or all ranks; between domains, the ranks of one.
        why_no_rank_mask: the reason between domains, else None.
        tuning: what was agreed on.
    """

    def __init__(self, name: str, parameters: GroupParameters, agreement: Agreement) -> None:
        """Allocates the heaps, and returns when all ranks of the mesh have mapped their peers'.

        Args:
            name: for messages.
            parameters: of the group; at least one of the mesh's GPUs is of this process.
            agreement: from `agree`.

        Raises:
            EpUnavailable: a heap does not fit, a peer's cannot be mapped, or a process failed or
                did not come. Nothing is left behind but what a peer may still map.
        """
        self._name = name
        self._parameters = parameters
        self._module = native.load_cuda()
        native.register_cuda_targets()
        ranks = placements(parameters.mesh, parameters.axis_names)
        self._ranks = ranks
        self._local_ranks = [rank for rank in ranks if rank.process == jax.process_index()]
        of_domain, self._use_rdma = agreement.domains
        spans_domains = of_domain < parameters.num_ranks
        self.domain_size = of_domain if spans_domains else parameters.domain_size
        # The kernels that go on without missing ranks are in one piece.
        self._has_halves = not spans_domains and parameters.on_timeout == "error"
        # A rank that does not take part would cut off its rail.
        self.why_no_rank_mask = "its ranks are in several domains" if spans_domains else None
        self.tuning = agreement.tuning
        heap = _heap(parameters, agreement)
        self._heap = heap
        self.heap_bytes: int = self._module.heap_bytes(heap)
        self.group_id = agreement.group_id
        self._bootstrap = agreement.bootstrap
        self._mapped_by_peers = False
        try:
            self._open(agreement.nonce, heap)
        except EpUnavailable as e:
            raise EpUnavailable(f"backend 'ffi' cannot serve {name}: {e}") from e
        places = {(r.group_index, r.rank): agreement.hosts[r.process] for r in ranks}
        far = self._far_failures(places) if spans_domains else None
        self._watch = _watch()
        self._watch.add(
            GroupWatch(
                name,
                warn_after=parameters.warn_after,
                timeout=parameters.timeout,
                places=places,
                store=self._bootstrap.store,
                prefix=self._bootstrap.prefix,
                far=far,
                stuck=self._stuck_kernels(places, far) if far and self._use_rdma else None,
            )
        )
        _open_groups[self] = None

    def _far_failures(self, places: dict[tuple[int, int], str]) -> FarFailures:
        return FarFailures(
            self._name,
            places=places,
            local=[(rank.group_index, rank.rank) for rank in self._local_ranks],
            store=self._bootstrap.store,
            prefix=self._bootstrap.prefix,
            tell=functools.partial(self._module.tell_give_up, self.group_id),
        )

    def _stuck_kernels(self, places: dict[tuple[int, int], str], far: FarFailures) -> StuckKernels:
        return StuckKernels(
            self._name,
            timeout=self._parameters.timeout,
            domain_size=self.domain_size,
            places=places,
            far=far,
            unread=functools.partial(self._module.unread_by, self.group_id),
            word=self._module.stuck_word,
            aborts=aborts(),
        )

    def _open(self, nonce: int, heap: object) -> None:
        boot = self._bootstrap
        with contextlib.ExitStack() as undo:
            if self._use_rdma:
                undo.enter_context(rdma.LOCK)
            pes: dict[int, int] = {}
            phases = ("rdma", "created", "handles", "connected", "disconnected")
            with boot.telling_failures(*phases):
                if self._use_rdma:
                    device = self._local_ranks[0].device_ordinal
                    network_bytes = self._module.network_heap_bytes(heap)
                    pes = rdma.join(boot, jax.process_index(), network_bytes, device)
                handles = self._create(nonce, heap)
                undo.callback(self._forget)
                if self.tuning.launches:
                    self.set_launches(self.tuning)
            if self._use_rdma:
                with boot.telling_failures("created", "handles", "connected", "disconnected"):
                    # What can fail in one process alone lies behind all of them.
                    boot.gather("created", {})
                    rdma.allocate(boot, self.group_id)
            with boot.telling_failures("handles", "connected"):
                # Who has the handles may map the heaps, also where this process fails meanwhile.
                self._mapped_by_peers = boot.has_others
                undo.callback(self._disconnect, _CLOSE_S, failed=True)
                messages = boot.gather("handles", {"handles": [h.hex() for h in handles]})
                self._connect(messages, pes)
                boot.gather("connected", {})
            undo.pop_all()
            if self._use_rdma:
                rdma.LOCK.release()
        boot.forget("join", "rdma", "created", "rdma_up", "rdma_anchor", "network_heap")
        boot.forget("network_place", "handles")

    def _create(self, nonce: int, heap: object) -> list[bytes]:
        config = self._parameters.config
        try:
            return self._module.create_group(
                group_id=self.group_id,
                name=self._name,
                nonce=nonce,
                warn_after_s=self._parameters.warn_after,
                timeout_s=self._parameters.timeout,
                max_num_sms=config.max_num_sms or 0,
                tail_num_sms=-1 if config.tail_num_sms is None else config.tail_num_sms,
                heap=heap,
                rdma=self._use_rdma,
                masks_missing_ranks=self._parameters.on_timeout == "mask",
                ranks=[(p.device_ordinal, p.group_index, p.rank) for p in self._local_ranks],
            )
        except (RuntimeError, MemoryError, ValueError) as e:
            raise EpUnavailable(str(e)) from e

    def _connect(self, messages: dict[int, Message], pes: dict[int, int]) -> None:
        handles = [bytes.fromhex(h) for m in messages.values() for h in m["handles"]]
        for local in self._local_ranks:
            of_group = [r for r in self._ranks if r.group_index == local.group_index]
            by_rank = sorted(of_group, key=lambda rank: rank.rank)
            try:
                self._module.connect_group(
                    self.group_id, local.group_index, local.rank, handles,
                    [pes[rank.process] for rank in by_rank] if pes else [],
                )  # fmt: skip
            except (RuntimeError, ValueError) as e:
                raise EpUnavailable(
                    f"rank {local.rank} (group_index {local.group_index}, GPU "
                    f"{local.device_ordinal}) cannot map its peers' memory: {e}"
                ) from e

    def _disconnect(
        self, limit: float, kernels_limit: float = math.inf, failed: bool = False
    ) -> None:
        """Unmaps the peers' heaps, and waits until the peers have unmapped ours."""
        why_not = "the group was not made" if failed else None
        limit = min(limit, self._parameters.timeout)
        try:
            self._module.disconnect_group(group_id=self.group_id, limit_s=kernels_limit)
        except TimeoutError as e:
            _logger.warning("%s: closed while %s; its memory is left as it is", self._name, e)
            if self._use_rdma:
                rdma.release(self._bootstrap, self.group_id, limit, str(e))
            return
        except RuntimeError as e:  # after a kernel gave up, CUDA refuses everything
            _logger.error("%s: cannot unmap its peers' memory: %s", self._name, e)
            why_not = str(e)
        limit_left = limit
        if self._use_rdma:
            # Waits for the same processes as what follows: once is enough.
            begin = time.monotonic()
            rdma.release(self._bootstrap, self.group_id, limit, why_not)
            limit_left = max(limit - (time.monotonic() - begin), 0.0)
        missing = self._bootstrap.leave("disconnected", limit_left)
        if missing:
            _logger.warning(
                "%s: closed without process(es) %s, which did not close it within %g s and may "
                "still use its memory: %.3g GiB on each GPU are left as they are until this "
                "process ends",
                self._name, ", ".join(map(str, missing)), limit, self.heap_bytes / 2**30,
            )  # fmt: skip
        else:
            self._mapped_by_peers = False
            self._bootstrap.forget("connected")

    def _forget(self) -> None:
        # Memory that a peer maps must not be freed: CUDA does not say what happens then.
        self._module.close_group(group_id=self.group_id, leave_heaps=self._mapped_by_peers)

    def health(self) -> EpHealth:
        """Whom the ranks of this process wait for."""
        return self._watch.health(self._name)

    def set_launches(self, tuning: Tuning) -> None:
        """Takes other launches from now on, in this process; for measuring them."""
        launches = [as_native(launch) for launch in tuning.launches]
        try:
            self._module.set_launches(group_id=self.group_id, launches=launches)
        except ValueError as e:
            raise EpUnavailable(str(e)) from e

    def dispatches_in_halves(self, num_tokens: int, *, quantized: bool) -> bool:
        """Those that the low-latency kernels serve in one domain, unless they may miss ranks."""
        fp8_rows = self._parameters.config.recv_dtype is not None
        return self._has_halves and self._module.dispatch_is_low_latency(
            self._heap, num_tokens=num_tokens, fp8_x=quantized, fp8_rows=fp8_rows
        )

    def combines_in_halves(self, num_tokens: int) -> bool:
        """Those that the low-latency kernels serve in one domain, unless they may miss ranks."""
        return self._has_halves and self._module.combine_is_low_latency(
            self._heap,
            num_tokens=num_tokens,
            domain_size=self.domain_size,
        )

    def give_up_on(self, ranks: Sequence[int], group_indices: Sequence[int]) -> None:
        """Ends the waits of this process's ranks that are for these ranks."""
        self._module.give_up_on(
            group_id=self.group_id, group_indices=list(group_indices), ranks=list(ranks)
        )

    def close(self, limit: float = _CLOSE_S, kernels_limit: float = math.inf) -> None:
        """Gives the memory back, once no peer maps it any more.

        Args:
            limit: seconds to wait for other processes, at most; the group's timeout if shorter.
            kernels_limit: seconds to wait for kernels of this process.
        """
        _open_groups.pop(self, None)
        with rdma.LOCK if self._use_rdma else contextlib.nullcontext():
            self._disconnect(limit, kernels_limit)
        self._watch.look()
        self._forget()


@functools.cache
def _watch() -> Watch:
    return Watch(native.load_cuda())


# A process that ends frees its memory, into which a slower peer may still have to store.
# So a group that nobody holds any more is still closed when the process ends.
# In the order in which they were made, which is the same in all processes.
_open_groups: dict[CudaGroup, None] = {}


@atexit.register
def _close_open_groups() -> None:
    for group in list(_open_groups):
        try:
            group.close(limit=_EXIT_S, kernels_limit=_EXIT_S)
        except Exception:
            _logger.exception("%s: not closed as this process ends", group._name)


def _heap(parameters: GroupParameters, agreement: Agreement) -> Any:
    """The compiled module's `HeapShape` of a group."""
    sizes = _heap_shape(parameters.config, parameters.num_ranks)
    if agreement.tuning.low_latency_tokens is not None:
        sizes["low_latency_tokens"] = agreement.tuning.low_latency_tokens
    if agreement.domains.size < parameters.num_ranks:
        sizes["num_neighbors"] = agreement.domains.size
    return native.load_cuda().HeapShape(**sizes)


def _heap_shape(config: EpConfig, num_ranks: int) -> dict[str, int]:
    """What a heap's size depends on, as the compiled module takes it."""
    return {
        "num_ranks": num_ranks,
        "num_experts": num_ranks * config.num_local_experts(num_ranks=num_ranks),
        "num_topk": config.num_topk,
        "max_tokens": config.max_tokens_per_rank,
        "hidden": config.hidden,
        "dtype": list(DTYPES).index(config.dtype.name),
        "wire": int(config.wire_dtype is not None),
        "layout": LAYOUTS.index(config.layout),
        "low_latency_tokens": config.low_latency_tokens or 0,
        "num_neighbors": 0,
        "gathered_domains": domains.gathered_domains(num_ranks),
    }


def host() -> str:
    """The same for all processes, in containers too, that one kernel runs."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()
