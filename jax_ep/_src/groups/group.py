# SPDX-License-Identifier: Apache-2.0
"""`EpGroup`: the ranks that exchange tokens, and how."""

import contextlib
import itertools
import logging
import math
import numbers
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, NoReturn

import jax
import numpy as np

from jax_ep._src.config import EpConfig
from jax_ep._src.errors import EpGroupClosed
from jax_ep._src.groups.backend_choice import Backend, choose_backend
from jax_ep._src.groups.deadlines import default_timeout
from jax_ep._src.groups.health import EpHealth
from jax_ep._src.groups.interface import BackendGroup, GroupParameters
from jax_ep._src.limits import is_int
from jax_ep._src.public import set_module
from jax_ep._src.ranges import check_num_ranks
from jax_ep._src.tuning import lookup
from jax_ep._src.tuning.launches import Tuning
from jax_ep._src.tuning.lookup import TuningArgument

_logger = logging.getLogger("jax_ep")
_BACKENDS = ("ffi", "xla")
OnTimeout = Literal["error", "mask"]


@set_module("jax_ep")
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
        on_timeout: "error" or "mask": what happens then.
        num_ranks: `R`.
        num_local_experts: `L`, experts of each rank; with `EpConfig.pad_experts` the last ranks'
            may be some that nobody selects.
        domain_size: `D` of the config; where that is None, `R`, or with backend "ffi" the ranks
            of a host if the ranks are on several.
        heap_bytes: bytes of GPU memory that each rank holds for its peers' rows. 0 on the CPU,
            where ranks share an address space, and with the `xla` backend.
        tuning: the `Tuning` that is in use; empty where nothing is tuned, as on CPU. Its
            `low_latency_tokens` is None where the config has a number of its own.
    """

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        axis_name: str | Sequence[str],
        config: EpConfig,
        *,
        backend: Backend | None = None,
        warn_after: float | None = None,
        timeout: float | None = None,
        on_timeout: OnTimeout = "error",
        tuning: TuningArgument = None,
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
            on_timeout: "error": when a rank has not come for `timeout`, the others fail. "mask":
                they go on without it, and `Dispatched.missing_ranks` and `combine_with_status` say
                so; exchanges are in one piece then, and have no gradient. Backend `ffi`; on GPUs in
                one domain, and in calls of at most `config.low_latency_tokens` tokens: larger ones
                fail as with "error". With `xla`, which has to be asked for, nobody is ever missing.
                See docs/guide/rank_masks.md.
            tuning: how kernels on GPUs are launched, and up to how many tokens the low-latency ones
                serve calls, where `EpConfig` leaves that open. It has no effect on the numbers, nor
                elsewhere. None: as tables of measurements say, if there are any for this kind of
                GPU and these sizes (docs/guide/tuning.md says where they are looked for). "off": as
                the model says. "require": as None, but all calls must be in a table. A path: that
                table before the others. A `Tuning`: as it says.

        Raises:
            ValueError: a bad argument, or a config that does not fit the number of ranks, or no
                table where `tuning` says.
            EpUnavailable: the backend that was asked for cannot serve, or with `on_timeout="mask"`
                `ffi` cannot and `xla` was not asked for; on GPUs also: memory is
                short, a process did not come, or with `tuning="require"` there is no table for
                the group. The message says why.
        """
        self.axis_name: str | tuple[str, ...] = (
            axis_name if isinstance(axis_name, str) else tuple(axis_name)
        )
        self.axis_names: tuple[str, ...] = (
            (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
        )
        _check_arguments(mesh, self.axis_names, config, backend)
        _check_on_timeout(on_timeout, config)
        lookup.check(tuning)
        self.mesh = mesh
        self.config = config
        self.platform: str = _platform(mesh)
        self.warn_after: float
        self.timeout: float
        self.on_timeout: OnTimeout = on_timeout
        self.warn_after, self.timeout = _deadlines(self.platform, warn_after, timeout)
        self.num_ranks: int = math.prod(mesh.shape[name] for name in self.axis_names)
        check_num_ranks(config, self.num_ranks, self.axis_name)
        self.num_local_experts: int = config.num_local_experts(num_ranks=self.num_ranks)
        parameters = GroupParameters(
            mesh=mesh,
            axis_names=self.axis_names,
            config=config,
            num_ranks=self.num_ranks,
            warn_after=self.warn_after,
            timeout=self.timeout,
            tuning=tuning,
            on_timeout=on_timeout,
        )
        self.backend: Backend
        self.backend, make = choose_backend(backend, self.platform, parameters)
        self.name: str = (
            f"EpGroup {next(_serial_numbers)} (axis {self.axis_name!r}, {self.num_ranks} ranks)"
        )
        self._closed = False  # no more calls
        self._ended = False  # nothing of it runs any more
        self._lock = threading.Lock()
        self._kept: dict[Hashable, Any] = {}
        self._backend_group = make(self.name)
        self.group_id: int = self._backend_group.group_id
        self.heap_bytes: int = self._backend_group.heap_bytes
        self.domain_size: int = self._backend_group.domain_size
        self.tuning: Tuning = self._backend_group.tuning
        if self.tuning != Tuning():
            _logger.info("%s: %s", self.name, self.tuning)

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
            own_groups = [value for value in self._kept.values() if isinstance(value, EpGroup)]
            self._kept.clear()
        for group in own_groups:
            group.close()
        if self.group_id >= 0:
            # Which may wait for a rank: until then `health` and `give_up_on` are of use.
            _wait_for_results(set(self.mesh.devices.flat))
        try:
            self._backend_group.close()  # on GPUs it waits for kernels, which may wait for a rank
        finally:
            self._ended = True

    def health(self) -> EpHealth:
        """Whom the ranks of this process wait for now, and since when.

        Never waits itself, and may be called from any thread. Says nothing of the `xla` backend.
        """
        return EpHealth() if self._ended else self._backend_group.health()

    def give_up_on(self, ranks: Iterable[int], *, group_index: int | None = None) -> None:
        """Ends the waits for ranks that will not come, and lets nobody wait for them again.

        For whoever learns that a process is gone before `timeout` has passed. A rank that is there
        before the others take part all the same; one that would have come within `timeout` is
        missing, too. It holds for as long as the group lives. May be called from any thread, and
        again, also while `close` waits.

        Args:
            ranks: positions along the group's axes.
            group_index: position of their EP group along the mesh's other axes; None: of all.

        Raises:
            ValueError: no such ranks, or `on_timeout` is "error".
            EpGroupClosed: the group has been closed, and nothing of it runs any more.
        """
        if self._ended:
            self.check_open()
        if self.on_timeout != "mask":
            raise ValueError(
                "give_up_on is called, and EpGroup.on_timeout is 'error'; allowed: a group with "
                "on_timeout 'mask'"
            )
        ranks = list(ranks)
        num_groups = self.mesh.size // self.num_ranks
        if not all(is_int(rank, 0, self.num_ranks - 1) for rank in ranks):
            raise ValueError(f"ranks is {ranks}; allowed: ints from 0 to {self.num_ranks - 1}")
        if group_index is not None and not is_int(group_index, 0, num_groups - 1):
            raise ValueError(
                f"group_index is {group_index!r}; allowed: None, or an int from 0 to "
                f"{num_groups - 1}"
            )
        groups = range(num_groups) if group_index is None else [group_index]
        _logger.warning("%s: given up on rank(s) %s", self.name, ",".join(map(str, ranks)))
        try:
            self._backend_group.give_up_on(
                [int(rank) for rank in ranks], [int(index) for index in groups]
            )
        except (RuntimeError, ValueError):
            self.check_open()  # it has been closed meanwhile
            raise

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
            f"backend={self.backend!r}, "
            + (f"on_timeout={self.on_timeout!r}, " if self.on_timeout != "error" else "")
            + f"config={self.config}"
            f"{', closed' if self._closed else ''})"
        )


def backend_group(group: EpGroup) -> BackendGroup:
    """What the backend keeps for an open group."""
    return group._backend_group


def kept(group: EpGroup, key: Hashable, make: Callable[[], Any]) -> Any:
    """What `make()` gives, made once for each key and kept until the group is closed.

    For jitted functions that know the group: JAX keeps static arguments, and what was compiled
    for them, as long as the function lives, so one of a module would keep all groups. Or for a
    group that this one needs, which is closed with it.

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


def _check_on_timeout(on_timeout: Any, config: EpConfig) -> None:
    if on_timeout not in ("error", "mask"):
        raise ValueError(f"on_timeout is {on_timeout!r}; allowed: 'error', 'mask'")
    if on_timeout == "mask" and config.drop == "even":
        raise ValueError(
            "on_timeout is 'mask', and EpConfig.drop is 'even', for which all ranks gather counts; "
            "allowed with 'mask': drop 'rows'"
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
