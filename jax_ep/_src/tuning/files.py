# SPDX-License-Identifier: Apache-2.0
"""Files of tables: where they are, and how they are read and written.

A bad file is never in anybody's way: it is ignored with a warning, once, and who writes moves it
aside. Writers take turns, and readers never see half of a file.
"""

import contextlib
import fcntl
import logging
import os
import pathlib
import re
import tempfile
import threading
from collections.abc import Iterator

from jax_ep._src.tuning.table import Table, UnknownFormatError, from_json, to_json

_logger = logging.getLogger("jax_ep")
_SHIPPED = pathlib.Path(__file__).resolve().parents[2] / "data" / "tuning"

_lock = threading.Lock()
_said: set[tuple[pathlib.Path, str]] = set()


def file_name(device: str) -> str:
    """Of the table of a kind of device: "NVIDIA H200" has nvidia_h200.json."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json"


def cache_path(device: str) -> pathlib.Path:
    """Where `python -m jax_ep tune` writes the table of a kind of device, unless told otherwise.

    In $JAX_EP_CACHE_DIR, or else in `jax_ep` of $XDG_CACHE_HOME or of ~/.cache.
    """
    folder = os.environ.get("JAX_EP_CACHE_DIR")
    if not folder:
        base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        folder = pathlib.Path(base) / "jax_ep"
    return pathlib.Path(folder) / "tuning" / file_name(device)


def places(device: str) -> list[pathlib.Path]:
    """Files that may have measurements of a kind of device; what an earlier one has, counts."""
    named = os.environ.get("JAX_EP_TUNING")
    first = [pathlib.Path(named)] if named else []
    return [*first, cache_path(device), _SHIPPED / file_name(device)]


def read(path: pathlib.Path) -> Table:
    """The table in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no table, or one of another format; the message names the file.
    """
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except UnknownFormatError as e:
        raise UnknownFormatError(f"{path}: {e}") from e
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: no table of tuning: {e}") from e
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def try_read(path: pathlib.Path) -> Table | None:
    """The table in a file; None if there is none that can be read, which is logged once."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        with _lock:
            is_new = (path, str(e)) not in _said
            _said.add((path, str(e)))
        if is_new:
            _logger.warning("ignoring a table of tuning: %s", e)
        return None


def merge_into(path: pathlib.Path, table: Table) -> Table:
    """Adds entries to the table in a file, which may not be there yet; all that it then has.

    Where the file has a table of another device, or none that can be read, it is moved to a name
    that ends in .old.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        before = try_read(path)
        if before is not None and before.device == table.device:
            table = before.merged(table)
        elif path.exists():
            os.replace(path, path.with_name(path.name + ".old"))
        _replace(path, to_json(table))
    return table


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """One process, and one thread of it, at a time. The system unlocks for one that ends."""
    with open(path.with_name(path.name + ".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(path: pathlib.Path, text: str) -> None:
    """Writes beside the file, and renames: at any moment it has the old text, or the new one."""
    number, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
