# SPDX-License-Identifier: Apache-2.0
"""What the hardware moves at most, as csrc/probe/link_probe.cu measures it."""

import json
import pathlib
import subprocess
from collections.abc import Iterable
from typing import Any

# It takes a few seconds.
DEADLINE_S = 30.0

# What is measured on some numbers of SMs: into SMs from memory, out of them into memory (of what
# is not loaded, loaded, and stored four times), and between GPUs, the first alone or all at once.
LOCAL = ("load", "store", "copy", "expand")
PEER = ("peer_store", "peer_store_all", "peer_load", "peer_load_all")


def parse(text: str) -> dict[str, Any]:
    """The numbers, bytes per second and seconds, from what the program prints.

    Returns:
        `rates`, by name and number of SMs; and with several GPUs `copy_engine` and `flag_latency`.

    Raises:
        ValueError: it is not all there.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"the link probe printed no JSON: {text!r}") from e
    expected = {"gpu", "num_gpus", "num_sms", "rates"}
    if found.get("num_gpus", 1) > 1:
        expected |= {"copy_engine", "flag_latency"}
    names = {*LOCAL, *(PEER if found.get("num_gpus", 1) > 1 else ())}
    if found.keys() != expected or found["rates"].keys() != names:
        raise ValueError(f"the link probe did not print all: {text!r}")
    found["rates"] = {
        name: {int(sms): rate for sms, rate in of.items()} for name, of in found["rates"].items()
    }
    if any(rate <= 0 for of in found["rates"].values() for rate in of.values()):
        raise ValueError(f"the link probe printed a rate of 0: {text!r}")
    return found


def run(program: pathlib.Path, *, num_gpus: int, sms: Iterable[int]) -> dict[str, Any]:
    """Measures with nobody else on the GPUs.

    Args:
        program: link_probe.
        num_gpus: from the first on.
        sms: the numbers of SMs to measure with.

    Raises:
        RuntimeError: it failed, or did not end.
        ValueError: what it printed is not all there.
    """
    counts = ",".join(str(n) for n in sorted(set(sms)))
    command = [str(program), f"gpus={num_gpus}", f"sms={counts}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=DEADLINE_S
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the link probe did not end within {DEADLINE_S:g} s") from None
    except subprocess.CalledProcessError as e:
        raise RuntimeError(f"the link probe failed: {(e.stderr or e.stdout).strip()}") from e
    return parse(done.stdout)
