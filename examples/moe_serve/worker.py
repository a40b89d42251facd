# SPDX-License-Identifier: Apache-2.0
"""A process that runs plans on its devices: `python -m moe_serve.worker SOCKET`.

`moe_serve.workers` starts it, and gives it the number of an open socket.
"""

import os
import select
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NoReturn

from moe_lm.devices import set_up_devices
from moe_serve import wire

if TYPE_CHECKING:
    from moe_serve.model import ServingModel


def main(socket: int) -> None:
    """Does what the supervisor says, as long as there is one."""
    # Service managers send it to all processes of a service. The supervisor still has texts to
    # finish then, and says when it is time.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = Connection(socket)
    watch(socket)
    try:
        begin = connection.recv()
        _join(begin)
        # Only now, because JAX reads the environment when it is imported.
        from moe_serve.loading import loaded  # noqa: PLC0415

        with loaded(begin.serve, begin.options) as model:
            connection.send(wire.Ready(model.title))
            try:
                _serve(connection, model.model)
            except EOFError:
                os._exit(1)  # the supervisor has gone
            except Exception as error:  # noqa: BLE001 - the supervisor is told
                # Here: closing the group would wait for ranks that wait for this one.
                _fail(connection, error, is_refused=False)
    except Exception as error:  # noqa: BLE001 - likewise
        _fail(connection, error, is_refused=_is_refusal(error))


def _fail(connection: Connection, error: Exception, *, is_refused: bool) -> NoReturn:
    if not is_refused:
        traceback.print_exception(error)
    connection.send(wire.Failed(f"{type(error).__name__}: {error}"[:2000], is_refused))
    sys.stderr.flush()
    os._exit(1)  # at once: JAX would wait for the others


def watch(socket: int) -> None:
    """Ends the process when the other end is closed, whatever it does: a step, or compiling."""

    def end_with_supervisor() -> None:
        poll = select.poll()
        poll.register(socket, 0)  # nothing but the end
        poll.poll()
        os._exit(1)

    threading.Thread(target=end_with_supervisor, daemon=True).start()


def _join(begin: wire.Begin) -> None:
    """The other processes, before JAX looks for devices."""
    options, number = begin.options, begin.number
    set_up_devices(options)
    from jax_ep.serving import join_service  # noqa: PLC0415 - as above

    each = options.num_devices // options.processes
    on_gpus = "cpu" not in os.environ["JAX_PLATFORMS"].split(",")[:1]
    join_service(
        begin.service,
        num_processes=options.processes,
        process_id=number,
        local_device_ids=range(number * each, (number + 1) * each) if on_gpus else None,
    )
    if number != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what the first prints is enough


def _is_refusal(error: Exception) -> bool:
    from jax_ep import EpUnavailable  # noqa: PLC0415 - as above

    return isinstance(error, (ValueError, EpUnavailable))


def _serve(connection: Connection, model: "ServingModel") -> None:
    own = model.own_devices
    while True:
        match connection.recv():
            case wire.Run(message):
                plan = wire.unpacked(message)
                written = model.run(plan)
                rows = enumerate(zip(plan.rows, written, strict=True))
                connection.send(wire.Ran({i: tuple(w) for i, (r, w) in rows if r.device in own}))
            case wire.SetExperts(has_expert):
                model.set_experts(has_expert)
            case wire.SetAlive(alive):
                model.set_alive(alive)
            case wire.TakeCounts():
                connection.send(model.take_counts())
            case wire.End():
                return


if __name__ == "__main__":
    main(int(sys.argv[1]))
