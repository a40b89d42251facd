# SPDX-License-Identifier: Apache-2.0
"""The compiled module `jax_ep._cuda` on a fake CUDA runtime: what is tested is all ours.

`make test-python` builds it. Groups are made on a mesh of CPU devices, and take themselves for
groups on GPUs; their heaps are memory that processes map from each other. Handlers run when they
are called as XLA would; what they launch is written down. The C++ side is in
csrc/runtime/tests/fake_cudart and xla_ffi/tests.
"""

import ctypes
import functools
import importlib.machinery
import importlib.util
import os
import pathlib
import sys
from collections.abc import Mapping
from types import ModuleType

import numpy as np
import pytest

from jax_ep._src.groups import cuda as cuda_group
from jax_ep._src.groups import group as group_module
from jax_ep._src.groups import kernel_errors as cuda_watch
from jax_ep._src.groups import native

ROOT = pathlib.Path(__file__).resolve().parents[2]
UNKNOWN = 999  # cudaErrorUnknown
OUT_OF_MEMORY = 2
_WORDS = "cudaMalloc: 32768 bytes"  # kWordsAtOnce times kControlBytes

# Name in NumPy -> XLA_FFI_DataType.
_DTYPES = {
    "bool": 1, "int32": 4, "int64": 5, "uint16": 7, "uint32": 8, "float16": 10, "float32": 11,
    "bfloat16": 16, "float8_e4m3fn": 20,
}  # fmt: skip


_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class XlaError(Exception):
    """What a handler returned to XLA."""


class _Buffer(ctypes.Structure):
    """As in xla_ffi/tests/fake_xla.h."""

    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
        ("data", ctypes.c_void_p),
    ]


class _Attribute(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("value", ctypes.c_int64),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("handler", "stream")),
        *((name, ctypes.c_int32) for name in ("device", "num_operands")),
        *((name, ctypes.c_int32) for name in ("num_results", "num_attributes")),
        ("operands", ctypes.POINTER(_Buffer)),
        ("results", ctypes.POINTER(_Buffer)),
        ("attributes", ctypes.POINTER(_Attribute)),
    ]


def _path() -> pathlib.Path:
    """Where the module is: what JAX_EP_FAKE_CUDA says, or what `make` built."""
    if named := os.environ.get("JAX_EP_FAKE_CUDA"):
        return pathlib.Path(named).absolute()
    folder = ROOT / "build" / f"fake_cuda-{sys.version_info[0]}.{sys.version_info[1]}"
    built = sorted(folder.glob("_cuda_on_fake.*so"))
    if not built:
        if not (ROOT / "csrc").is_dir():
            pytest.skip("the C++ sources are not here: `make test` runs it")
        pytest.fail(f"{folder} has no module; `make fake-cuda` builds it")
    return built[-1]


@functools.cache
def load() -> tuple[ModuleType, ctypes.CDLL]:
    """The module, once in a process, and its C functions."""
    path = _path()
    # Its own name: the module's entry point is called after it.
    loader = importlib.machinery.ExtensionFileLoader("jax_ep._cuda", str(path))
    spec = importlib.util.spec_from_loader("jax_ep._cuda", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    library = ctypes.CDLL(str(path))
    library.jax_ep_fake_cudart.restype = ctypes.c_char_p
    library.jax_ep_fake_xla_call.argtypes = [ctypes.POINTER(_Call)]
    library.jax_ep_fake_xla_call.restype = ctypes.c_char_p
    return module, library


@functools.cache
def _watch() -> cuda_watch.Watch:
    return cuda_watch.Watch(load()[0])


class FakeCudart:
    """Tells the fake CUDA runtime of this process what to do, and asks what happened."""

    def __init__(self) -> None:
        self.module, self._library = load()

    def tell(self, command: str) -> str:
        """A command of csrc/runtime/tests/fake_cudart/commands.h."""
        answer = self._library.jax_ep_fake_cudart(command.encode()).decode()
        assert not answer.startswith("unknown command"), answer
        return answer

    def lines(self, command: str) -> list[str]:
        return self.tell(command).splitlines()

    def reset(self, devices: int, first: int = 0) -> None:
        """As if the process had only begun, with devices whose UUIDs count from `first`."""
        self.tell(f"reset {devices} {first}")

    def fail(self, function: str, n: int = 1, error: int = UNKNOWN) -> None:
        """Lets the n-th call from now on fail, of a function or of "any"."""
        self.tell(f"fail {function} {n} {error}")

    def leaks(self) -> list[str]:
        """But for the pools of ranks' words, which only grow: a part of each kind of memory."""
        leaks = self.lines("leaks")
        while any(leak.startswith("cudaHostAlloc: ") for leak in leaks):
            for begin in (_WORDS, "cudaHostAlloc: "):
                leaks.remove(next(leak for leak in leaks if leak.startswith(begin)))
        return leaks

    def violations(self) -> list[str]:
        return self.lines("violations")

    def launches(self) -> list[dict]:
        """Parameters of each kernel launched, by name; pointers are numbers."""
        return [_parsed(line) for line in self.lines("launches")]

    def check_clean(self) -> None:
        """Nothing is open, and nothing was misused."""
        assert self.module.num_groups() == 0
        assert self.leaks() == []
        assert self.violations() == []
        assert self.tell("last_error") == "0"
        assert self.tell("pending_failures") == "0"

    def call(
        self,
        target: str,
        operands: list[np.ndarray],
        results: list[np.ndarray],
        attributes: Mapping[str, np.generic],
        *,
        device: int = 0,
        stream: int = 0,
    ) -> None:
        """Calls a handler. Raises XlaError with its code and message if it returns one.

        Args:
            target: name of the FFI target.
            operands: its operands.
            results: its results.
            attributes: by name; "ep.num_ranks" is an entry of the dictionary "ep".
            device: ordinal.
            stream: that kernels are launched on.
        """
        capsule = self.module.cuda_targets()[target]["execute"]
        names = sorted(attributes)
        values = (_Attribute * len(names))(*(_attribute(name, attributes[name]) for name in names))
        shapes: list[ctypes.Array] = []  # kept alive
        call = _Call(
            handler=_get_pointer(capsule, b"xla._CUSTOM_CALL_TARGET"),
            stream=stream,
            device=device,
            num_operands=len(operands),
            num_results=len(results),
            num_attributes=len(names),
            operands=_buffers(operands, shapes),
            results=_buffers(results, shapes),
            attributes=values,
        )
        if error := self._library.jax_ep_fake_xla_call(ctypes.byref(call)).decode():
            raise XlaError(error)


def _buffers(arrays: list[np.ndarray], shapes: list[ctypes.Array]) -> ctypes.Array:
    made = (_Buffer * len(arrays))()
    for buffer, array in zip(made, arrays, strict=True):
        shapes.append((ctypes.c_int64 * array.ndim)(*array.shape))
        buffer.dtype = _DTYPES[array.dtype.name]
        buffer.rank = array.ndim
        buffer.dims = ctypes.cast(shapes[-1], ctypes.POINTER(ctypes.c_int64))
        buffer.data = array.ctypes.data
    return made


def _attribute(name: str, value: np.generic) -> _Attribute:
    return _Attribute(name.encode(), _DTYPES[value.dtype.name], 0, int(value))


def _parsed(line: str) -> dict:
    operation, *fields = line.split()
    pairs = [field.split("=") for field in fields]
    launch = {
        name: [int(part) for part in text.split(",")] if name.endswith("heap") else int(text)
        for name, text in pairs
    }
    return {"operation": operation, **launch}


def install(patch: pytest.MonkeyPatch, devices: int, first: int = 0) -> FakeCudart:
    """Puts the module on a fresh fake runtime in the place of the installed one."""
    fake = FakeCudart()
    fake.reset(devices, first)
    patch.setattr(native, "_try_load_cuda", lambda: (fake.module, None))
    patch.setattr(native, "_registered", set(native._registered))
    patch.setattr(cuda_group, "_watch", _watch)
    patch.setattr(group_module, "_platform", lambda mesh: "cuda")
    return fake
