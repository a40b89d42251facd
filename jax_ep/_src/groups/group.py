# SPDX-License-Identifier: Apache-2.0
"""`EpGroup`: the ranks that exchange tokens, and how."""

import contextlib
import itertools
import math
import numbers
import threading
from collections.abc import Callable, Hashable, Sequence
from types import TracebackType
from typing import Any, NoReturn

import jax
import numpy as np

from jax_ep._src.config import EpConfig
from jax_ep._src.errors import EpGroupClosed
from jax_ep._src.groups.backend_choice import choose_backend
from jax_ep._src.groups.deadlines import default_timeout
from jax_ep._src.groups.health import EpHealth
from jax_ep._src.groups.interface import BackendGroup, GroupParameters
from jax_ep._src.ranges import check_num_ranks

_BACKENDS = ("ffi", "xla")


class EpGroup:
    """The ranks along one or several axes of a mesh, and the formats of their exchange.

    One object covers an EP group for each coordinate of the mesh's other axes: on a mesh
    `("data", "expert")` of shape (2, 4), `EpGroup(mesh, "expert", config)` is two groups of four
    ranks. A rank is a position along the axes, in row-major order where there are several; it
    does not depend on device numbers.

    It is a context manager, and hashable, so that functions passed to `jit` may close over it.
    Groups are equal only to themselves. Several groups live side by side in one process.

    Attributes:
        mesh: the mesh it was made for.
        axis_name: as it was given.
        axis_names: the same, always a tuple.
        config: as it was given.
        backend: "ffi" or "xla": what serves this group.
        platform: of the mesh's devices: "cpu", "cuda" or another.
        warn_after: seconds after which a rank that has not come is logged.
        timeout: seconds after which a rank that has not come is given up.
        num_ranks: `R`.
        num_local_experts: `L`, experts of each rank; with `EpConfig.pad_experts` the last ranks'
            may be some that nobody selects.
        domain_size: `D` of the config; where that is None, `R`, or with backend "ffi" the ranks
            of a host if the ranks are on several.
        heap_bytes: bytes of GPU memory that each rank holds for its peers' rows. 0 on the CPU,
            where ranks share an address space, and with the `xla` backend.
    """

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        axis_name: str | Sequence[str],
        config: EpConfig,
        *,
        backend: str | None = None,
        warn_after: float | None = None,
        timeout: float | None = None,
    ) -> None:
        """Makes a group. Call it outside `jit`, in every process of the mesh.

        Args:
            mesh: a `jax.sharding.Mesh` of devices.
            axis_name: the axis (or axes) along which the experts are spread.
            config: sizes and formats.
            backend: "ffi" (this library's own kernels), "xla" (collectives of XLA), or None: the
                best that can serve this mesh. An explicit choice never falls back.
            warn_after: seconds that ranks wait for one that does not come before the logger
                `jax_ep` gets a warning that names it, and again after 2, 4, 8 ... times as long.
                None: 10, or half of a shorter `timeout`. `math.inf`: never. Backend `ffi` only.
            timeout: seconds that ranks wait for one that does not come before all of them fail
                with an error that names it. None: 30 on CPU, where XLA ends a process that waits
                for one of its own collectives for 40; 1800 on GPUs, where a rank that gives up
                costs its process. `math.inf`: never. On GPUs it is also how long processes wait
                for each other when the group is made. Backend `ffi` only.

        Raises:
            ValueError: a bad argument, or a config that does not fit the number of ranks.
            EpUnavailable: the backend that was asked for cannot serve; on GPUs also: memory is
                short, or a process did not come. The message says why.
        """
        self.axis_name = axis_name if isinstance(axis_name, str) else tuple(axis_name)
        self.axis_names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
        _check_arguments(mesh, self.axis_names, config, backend)
        self.mesh = mesh
        self.config = config
        self.platform = _platform(mesh)
        self.warn_after, self.timeout = _deadlines(self.platform, warn_after, timeout)
        self.num_ranks = math.prod(mesh.shape[name] for name in self.axis_names)
        check_num_ranks(config, self.num_ranks, self.axis_name)
        self.num_local_experts = config.num_local_experts(num_ranks=self.num_ranks)
        parameters = GroupParameters(
            mesh=mesh,
            axis_names=self.axis_names,
            config=config,
            num_ranks=self.num_ranks,
            warn_after=self.warn_after,
            timeout=self.timeout,
        )
        self.backend, make = choose_backend(backend, self.platform, parameters)
        self.name = (
            f"EpGroup {next(_serial_numbers)} (axis {self.axis_name!r}, {self.num_ranks} ranks)"
        )
        self._closed = False
        self._lock = threading.Lock()
        self._kept: dict[Hashable, Any] = {}
        self._backend_group = make(self.name)
        self.group_id = self._backend_group.group_id
        self.heap_bytes = self._backend_group.heap_bytes
        self.domain_size = self._backend_group.domain_size

    def close(self) -> None:
        """Frees what the group holds. Using it afterwards is an error; closing twice is not.

        Waits for computations in flight on the group's devices whose results somebody holds.
        Functions compiled with the group fail when they are called afterwards (backend `ffi`); on
        GPUs a call that XLA replays from a CUDA graph gives NaN and -1 instead, and the logger
        `jax_ep` an error. On GPUs every process must call it: each waits, for a minute at most,
        until the others do not use its memory any more.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._kept.clear()
        if self.group_id >= 0:
            _wait_for_results(set(self.mesh.devices.flat))
        self._backend_group.close()

    def health(self) -> EpHealth:
        """Whom the ranks of this process wait for now, and since when.

        Never waits itself, and may be called from any thread. Says nothing of the `xla` backend.
        """
        return EpHealth() if self._closed else self._backend_group.health()

    @property
    def closed(self) -> bool:
        """Whether `close()` has been called."""
        return self._closed

    def check_open(self) -> None:
        """Raises `EpGroupClosed` after `close()`."""
        if self._closed:
            raise EpGroupClosed(f"{self.name} has been closed; make a new EpGroup")

    def __enter__(self) -> "EpGroup":
        self.check_open()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # A group is equal only to itself, and what is traced with it knows it by its number: a copy of
    # a model has the same groups.
    def __copy__(self) -> "EpGroup":
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> "EpGroup":
        del memo
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an EpGroup belongs to its process and cannot be pickled; pickle its config and the "
            "names of its axes, and make the group again from them and a mesh"
        )

    def __repr__(self) -> str:
        return (
            f"EpGroup(axis_name={self.axis_name!r}, num_ranks={self.num_ranks}, "
            f"backend={self.backend!r}, config={self.config}"
            f"{', closed' if self._closed else ''})"
        )


def backend_group(group: EpGroup) -> BackendGroup:
    """What the backend keeps for an open group."""
    return group._backend_group


def kept(group: EpGroup, key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make()` gives, made once for each key and kept until the group is closed.

    For jitted functions that know the group: JAX keeps static arguments, and what was compiled
    for them, as long as the function lives, so one of a module would keep all groups.

    Raises:
        EpGroupClosed: the group has been closed.
    """
    with group._lock:
        group.check_open()
        if key not in group._kept:
            group._kept[key] = make()
        return group._kept[key]


def _wait_for_results(devices: set[jax.Device]) -> None:
    """Blocks until every array on these devices is there.

    Programs run asynchronously: one launched before `close()` must still find its group.
    """
    for array in jax.live_arrays():
        # An array of a failed program raises its error to whoever reads it, not here.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if not array.is_deleted() and not devices.isdisjoint(array.devices()):
                array.block_until_ready()


# For names in messages; ids of the compiled module count only its own groups.
_serial_numbers = itertools.count()


def _check_arguments(
    mesh: jax.sharding.Mesh, axis_names: tuple[str, ...], config: EpConfig, backend: str | None
) -> None:
    if not isinstance(mesh, jax.sharding.Mesh):
        raise ValueError(f"mesh is a {type(mesh).__name__}; allowed: a jax.sharding.Mesh")
    _check_axes(mesh, axis_names)
    if not isinstance(config, EpConfig):
        raise ValueError(f"config is a {type(config).__name__}; allowed: an EpConfig")
    if backend is not None and backend not in _BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed: None, 'ffi', 'xla'")
    if isinstance(jax.numpy.zeros(()), jax.core.Tracer):
        raise ValueError(
            "an EpGroup is made inside jit, once for each compilation; allowed: outside of it, in "
            "a variable that the jitted function closes over"
        )


def _check_axes(mesh: jax.sharding.Mesh, axis_names: tuple[str, ...]) -> None:
    known = tuple(mesh.axis_names)
    if not axis_names or len(set(axis_names)) != len(axis_names):
        raise ValueError(f"axis_name is {axis_names!r}; allowed: one or more distinct axes")
    for name in axis_names:
        if name not in known:
            raise ValueError(f"axis_name {name!r} is not an axis of the mesh; allowed: {known}")


def _platform(mesh: jax.sharding.Mesh) -> str:
    """Of the mesh's devices, as JAX's lowering names it: "cpu", "cuda", ..."""
    names = {device.platform for device in np.asarray(mesh.devices).flat}
    # Devices call themselves "gpu"; what is compiled for them is of platform "cuda".
    return "/".join(sorted("cuda" if name == "gpu" else name for name in names))


_WARN_AFTER_S = 10.0


def _deadlines(
    platform: str, warn_after: float | None, timeout: float | None
) -> tuple[float, float]:
    """Seconds until the log names a late rank, and until the ranks give it up."""
    for name, value in (("warn_after", warn_after), ("timeout", timeout)):
        if value is not None and not _is_above_zero(value):
            raise ValueError(f"{name} is {value!r}; allowed: None, or seconds above 0 (math.inf)")
    until_given_up = default_timeout(platform) if timeout is None else float(timeout)
    if warn_after is None:
        return min(_WARN_AFTER_S, until_given_up / 2), until_given_up
    if until_given_up <= float(warn_after) < math.inf:
        raise ValueError(
            f"warn_after is {warn_after!r} and timeout is {until_given_up:g}; allowed: a "
            "warn_after below timeout"
        )
    return float(warn_after), until_given_up


def _is_above_zero(value: Any) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and float(value) > 0  # false for NaN
