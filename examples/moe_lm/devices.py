# SPDX-License-Identifier: Apache-2.0
"""Devices for the mesh, before JAX is imported."""

import os

from moe_lm.options import Options


def set_up_devices(options: Options) -> None:
    """Asks JAX for as many CPU devices as this process has of the mesh.

    Unless the user has decided otherwise, or a launcher has started the processes.
    """
    if options.platform == "auto":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    else:
        os.environ["JAX_PLATFORMS"] = options.platform
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags and not options.cluster:
        own = options.num_devices // options.processes
        count = f"--xla_force_host_platform_device_count={own}"
        os.environ["XLA_FLAGS"] = f"{flags} {count}".strip()
