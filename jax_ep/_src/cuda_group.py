# SPDX-License-Identifier: Apache-2.0
"""A group's memory on GPUs: made in every process, mapped by its peers, and given back."""

import contextlib
import logging
import math
import pathlib
import platform
import secrets
import threading
from collections.abc import Sequence
from types import ModuleType

import jax

from jax_ep._src import native
from jax_ep._src.bootstrap import Bootstrap, Message, group_id, group_key
from jax_ep._src.config import EpConfig
from jax_ep._src.errors import EpUnavailable
from jax_ep._src.health import EpHealth
from jax_ep._src.placements import placements

_logger = logging.getLogger("jax_ep")

# As in csrc/core/heap_layout.h.
_MAX_RANKS = 64
_MAX_TOPK = 32
_MAX_EXPERTS = 4096
_MAX_TOKENS = 2**20

# As the compiled module numbers them, see csrc/core/dtype.h and csrc/core/ep_shape.h.
_DTYPES = ("float32", "bfloat16", "float16")
_LAYOUTS = ("expert", "rank")

_WATCH_PERIOD_S = 0.5


def why_too_large(config: EpConfig, num_ranks: int) -> str | None:
    """Which size the kernels cannot serve; None if they can serve all."""
    for field, most in (
        ("num_topk", _MAX_TOPK),
        ("num_experts", _MAX_EXPERTS),
        ("max_tokens_per_rank", _MAX_TOKENS),
    ):
        value = getattr(config, field)
        if value > most:
            return f"EpConfig.{field} is {value}; on GPUs it may be at most {most}"
    if num_ranks > _MAX_RANKS:
        return f"the group has {num_ranks} ranks; on GPUs it may have at most {_MAX_RANKS}"
    return None


class CudaGroup:
    """A group in the compiled module, with the heaps of the ranks on this process's GPUs.

    Attributes:
        group_id: the group's id in the compiled module.
        heap_bytes: bytes of each rank's heap.
    """

    def __init__(
        self,
        name: str,
        mesh: jax.sharding.Mesh,
        axis_names: Sequence[str],
        config: EpConfig,
        timeout: float,
    ) -> None:
        """Allocates the heaps, and returns when all ranks of the mesh have mapped their peers'.

        Args:
            name: for messages.
            mesh: of GPUs, one of them at least of this process.
            axis_names: the group's axes.
            config: sizes and formats.
            timeout: seconds that kernels wait for a peer, and processes for each other.

        Raises:
            EpUnavailable: a heap does not fit, a peer's cannot be mapped, or a process failed or
                did not come. Nothing is left behind.
        """
        self._name = name
        self._module = native.load_cuda()
        native.register_cuda_targets()
        everywhere = placements(mesh, axis_names)
        me = jax.process_index()
        self._here = [place for place in everywhere if place.process == me]
        self._num_ranks = math.prod(mesh.shape[axis] for axis in axis_names)
        self._config = config
        self._timeout = timeout
        shape = _heap_shape(config, self._num_ranks)
        self.heap_bytes: int = self._module.heap_bytes(**shape)
        key = group_key(mesh, axis_names)
        self.group_id = group_id(key)
        self._bootstrap = Bootstrap(key, sorted({p.process for p in everywhere}), me, timeout)
        try:
            self._open(shape)
        except EpUnavailable as e:
            raise EpUnavailable(f"backend 'ffi' cannot serve {name}: {e}") from e
        self._watch = _ErrorWatch(self._module, self.group_id, name)

    def _open(self, shape: dict[str, int]) -> None:
        boot = self._bootstrap
        with contextlib.ExitStack() as undo:
            with boot.telling_failures("nonce", "handles", "connected", "disconnected"):
                nonce = boot.from_first("nonce", {"nonce": secrets.randbits(63)})["nonce"]
                handles = self._create(nonce, shape)
                undo.callback(self._module.close_group, self.group_id)
                messages = boot.gather("handles", self._message(handles))
                self._check(messages)
            with boot.telling_failures("connected"):
                undo.callback(self._disconnect)
                self._connect(messages)
                boot.gather("connected", {})
            undo.pop_all()
        boot.forget("nonce", "handles")

    def _create(self, nonce: int, shape: dict[str, int]) -> list[bytes]:
        try:
            return self._module.create_group(
                group_id=self.group_id,
                name=self._name,
                nonce=nonce,
                timeout_s=self._timeout,
                num_sms=self._config.num_sms or 0,
                **shape,
                ranks=[(p.device_ordinal, p.group_index, p.rank) for p in self._here],
            )
        except (RuntimeError, MemoryError) as e:
            raise EpUnavailable(str(e)) from e

    def _message(self, handles: list[bytes]) -> Message:
        return {
            "host": _host(),
            "config": f"{self._config}, timeout={self._timeout:g}",
            "handles": [
                [place.group_index, place.rank, handle.hex()]
                for place, handle in zip(self._here, handles, strict=True)
            ],
        }

    def _check(self, messages: dict[int, Message]) -> None:
        mine = messages[self._here[0].process]
        hosts: dict[int, dict[str, int]] = {}  # group_index -> host -> one of its processes
        for process, message in sorted(messages.items()):
            if message["config"] != mine["config"]:
                raise EpUnavailable(
                    f"process {process} made it with another config: {message['config']}; here it "
                    f"is {mine['config']}"
                )
            for group_index, _, _ in message["handles"]:
                hosts.setdefault(group_index, {}).setdefault(message["host"], process)
        for group_index, processes in hosts.items():
            if len(processes) > 1:
                where = " and ".join(map(str, processes.values()))
                raise EpUnavailable(
                    f"its ranks are on several hosts (processes {where}, group_index "
                    f"{group_index}), and the kernels reach over the NVLink of one: choose axes "
                    "inside a host, or backend='xla'"
                )

    def _connect(self, messages: dict[int, Message]) -> None:
        by_place = {
            (group_index, rank): bytes.fromhex(handle)
            for message in messages.values()
            for group_index, rank, handle in message["handles"]
        }
        for place in self._here:
            handles = [by_place[place.group_index, rank] for rank in range(self._num_ranks)]
            try:
                self._module.connect_group(self.group_id, place.group_index, place.rank, handles)
            except (RuntimeError, ValueError) as e:
                raise EpUnavailable(
                    f"rank {place.rank} (group_index {place.group_index}, GPU "
                    f"{place.device_ordinal}) cannot map its peers' memory: {e}"
                ) from e

    def _disconnect(self) -> None:
        """Unmaps the peers' heaps, and waits until the peers have unmapped ours."""
        try:
            self._module.disconnect_group(self.group_id)
        except RuntimeError as e:  # after a kernel gave up, CUDA refuses everything
            _logger.error("%s: cannot unmap its peers' memory: %s", self._name, e)
        missing = self._bootstrap.leave("disconnected")
        if missing:
            _logger.warning(
                "%s: closed without process(es) %s, which did not close it within %g s",
                self._name,
                ", ".join(map(str, missing)),
                self._timeout,
            )
        else:
            self._bootstrap.forget("connected")

    def error(self) -> str | None:
        """What a kernel of this process's ranks reported when it gave up; None if none did."""
        return self._module.error_of(self.group_id)

    def health(self) -> EpHealth:
        """Whom the ranks of this process wait for."""
        return EpHealth(aborted=self.error())

    def close(self) -> None:
        """Gives the memory back, once no peer maps it any more. No kernel may be running."""
        self._watch.stop()
        self._disconnect()
        self._module.close_group(self.group_id)


class _ErrorWatch:
    """Logs, once, why a kernel gave up: XLA reports it as nothing but a failed launch.

    The thread knows the compiled module and the group's id, and keeps neither the group nor its
    functions alive.
    """

    def __init__(self, module: ModuleType, group_id: int, name: str) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(module, group_id, name), name=f"jax_ep {name}", daemon=True
        )
        self._thread.start()

    def _run(self, module: ModuleType, group_id: int, name: str) -> None:
        stopping = False
        while not stopping:
            stopping = self._stop.wait(_WATCH_PERIOD_S)
            error = module.error_of(group_id)
            if error is not None:
                _logger.error("%s: %s", name, error)
                return

    def stop(self) -> None:
        """Looks a last time, and ends the thread."""
        self._stop.set()
        self._thread.join()


def _heap_shape(config: EpConfig, num_ranks: int) -> dict[str, int]:
    """What a heap's size depends on, as the compiled module takes it."""
    return {
        "num_ranks": num_ranks,
        "num_experts": config.num_experts,
        "num_topk": config.num_topk,
        "max_tokens": config.max_tokens_per_rank,
        "hidden": config.hidden,
        "dtype": _DTYPES.index(config.dtype.name),
        "wire": int(config.wire_dtype is not None),
        "layout": _LAYOUTS.index(config.layout),
    }


def _host() -> str:
    """The same for all processes, in containers too, that one kernel runs."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()
