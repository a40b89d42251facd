# SPDX-License-Identifier: Apache-2.0
"""What the compiled module has to say while programs run, on its way to the logger `jax_ep`.

A program that waits may never return to Python: XLA ends a process whose collectives lack a device.
So a thread of its own logs what a failed or late rank is known of, at once.
"""

import atexit
import logging
import threading
import traceback
from types import ModuleType

_logger = logging.getLogger("jax_ep")
_lock = threading.Lock()
_thread: threading.Thread | None = None


def start(module: ModuleType) -> None:
    """Starts the thread, once in a process; `module` is the compiled one for CPU."""
    global _thread
    with _lock:
        if _thread is not None:
            return
        _thread = threading.Thread(
            target=_log_all, args=(module,), name="jax_ep notices", daemon=True
        )
        _thread.start()
    # Before the interpreter goes: a thread that comes back from C++ later finds none.
    atexit.register(_stop, module, _thread)


def _log_all(module: ModuleType) -> None:
    while (notice := module.next_notice()) is not None:
        level, text = notice
        try:
            _logger.log(level, "%s", text)
        except Exception:  # noqa: BLE001  of a handler; another notice may follow
            traceback.print_exc()


def _stop(module: ModuleType, thread: threading.Thread) -> None:
    module.stop_notices()
    thread.join(timeout=5.0)
