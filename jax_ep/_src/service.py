# SPDX-License-Identifier: Apache-2.0
"""JAX's coordination service in a process of its own. `jax_ep.serving` has the public names."""

import contextlib
import socket
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import jax

from jax_ep._src import compat
from jax_ep._src.limits import is_int
from jax_ep._src.public import set_module


@set_module("jax_ep.serving")
class CoordinationService:
    """JAX's coordination service, as long as it is open; `start_service` makes it.

    Attributes:
        address: what processes join, "HOST:PORT".
    """

    def __init__(self, address: str, service: Any) -> None:
        self.address = address
        self._service = service

    def close(self) -> None:
        """Ends it; processes that are still joined end themselves then. Again does nothing."""
        service, self._service = self._service, None
        if service is not None:
            service.shutdown()

    def __enter__(self) -> "CoordinationService":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@set_module("jax_ep.serving")
def start_service(
    num_processes: int, *, host: str = "127.0.0.1", heartbeat_timeout: int = 10
) -> CoordinationService:
    """Runs JAX's coordination service in this process, for others.

    `jax.distributed.initialize` has process 0 run it, so that all processes end when that one
    does. A supervisor that runs it, and computes nothing, outlives each of them:

        with jax_ep.serving.start_service(8) as service:
            ...  # start 8 processes, each of which calls `join_service(service.address, ...)`

    It starts none of JAX's backends, and uses no device.

    Args:
        num_processes: how many will join, at least 1.
        host: a name or address of this machine, which they reach it by.
        heartbeat_timeout: seconds without a sign of life after which a process is taken for dead,
            at least 1.

    Raises:
        ValueError: an argument is not allowed.
        EpUnavailable: this jaxlib has no such service; the function is none of JAX's public ones.
    """
    _check_positive("num_processes", num_processes)
    _check_positive("heartbeat_timeout", heartbeat_timeout)
    with _reserved_port(host) as port:
        address = f"{host}:{port}"
        service = compat.coordination_service(address, num_processes, heartbeat_timeout)
    return CoordinationService(address, service)


@set_module("jax_ep.serving")
def join_service(
    address: str,
    *,
    num_processes: int,
    process_id: int,
    local_device_ids: Sequence[int] | None = None,
    heartbeat_timeout: int = 10,
) -> None:
    """Has this process compute with others, as `jax.distributed.initialize` does.

    To be called before JAX looks for devices. When another one dies, this process is not ended. It
    still stands if it waits for that one, as in a collective of XLA. SIGTERM ends it, which is
    JAX's own to handle otherwise.

    Args:
        address: of the `CoordinationService`.
        num_processes: as there.
        process_id: from 0 to `num_processes - 1`.
        local_device_ids: the GPUs that it uses; None: all that it sees.
        heartbeat_timeout: as there.

    Raises:
        ValueError: an argument is not allowed.
    """
    _check_positive("num_processes", num_processes)
    _check_positive("heartbeat_timeout", heartbeat_timeout)
    if not is_int(process_id, 0, num_processes - 1):
        raise ValueError(f"process_id is {process_id!r}; allowed: 0 to {num_processes - 1}")
    compat.survive_others()
    jax.distributed.initialize(
        address,
        num_processes,
        process_id,
        local_device_ids=local_device_ids,
        heartbeat_timeout_seconds=heartbeat_timeout,
        # Process 0 always runs a service. Nobody uses it, so it may have any port.
        coordinator_bind_address="127.0.0.1:0",
    )


def _check_positive(name: str, value: object) -> None:
    if not is_int(value):
        raise ValueError(f"{name} is {value!r}; allowed: an int of at least 1")


@contextlib.contextmanager
def _reserved_port(host: str) -> Iterator[int]:
    """A free port, which nobody else gets while gRPC, which shares ports, begins to listen."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((host, 0))
        yield holder.getsockname()[1]
