# SPDX-License-Identifier: Apache-2.0
"""Checks, with `bazel query`, that Bazel's visibility lets imports go one way only.

    python tools/bazel/check_layers.py [BAZEL [STARTUP OPTIONS...]]

Of the layers, each may see those that it is built on. If it saw another, a dependency on that would
be as good to Bazel as any.
"""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

# The layers, lowest first, and which of the others each one sees.
SEES = {
    "//csrc/core:core": set(),
    "//csrc/tuning:tuning": {"//csrc/core:core"},
    "//csrc/cpu:cpu": {"//csrc/core:core"},
    "//csrc/device:device": {"//csrc/core:core"},
    "//csrc/sim:sim": {"//csrc/core:core", "//csrc/device:device"},
    "//csrc/launch:launch": {"//csrc/core:core", "//csrc/tuning:tuning"},
    "//csrc/kernels:kernels": {
        "//csrc/core:core",
        "//csrc/device:device",
        "//csrc/launch:launch",
        "//csrc/tuning:tuning",
    },
    "//csrc/runtime:runtime": {
        "//csrc/core:core",
        "//csrc/launch:launch",
        "//csrc/tuning:tuning",
    },
    "//xla_ffi:_ext": {
        "//csrc/core:core",
        "//csrc/cpu:cpu",
        "//csrc/kernels:kernels",
        "//csrc/launch:launch",
        "//csrc/runtime:runtime",
        "//csrc/tuning:tuning",
    },
    "//jax_ep:compiled": {"//xla_ffi:_ext"},
    "//jax_ep/reference:reference": set(),
    "//jax_ep/_src:moe": {"//jax_ep:compiled"},
    "//jax_ep/flax:flax": {"//jax_ep/_src:moe"},
}


def seen_by(layer: str, bazel: list[str]) -> set[str]:
    """Returns the other layers that Bazel would let this one depend on."""
    others = " ".join(other for other in SEES if other != layer)
    query = ["query", "--ui_event_filters=-info", "--noshow_progress"]
    command = [*bazel, *query, f"visible({layer}, set({others}))"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return set(done.stdout.split())


def main() -> int:
    """Prints what differs; the exit status is 1 if anything does."""
    failed = False
    for layer, expected in SEES.items():
        seen = seen_by(layer, sys.argv[1:] or ["bazel"])
        for other in sorted(seen ^ expected):
            failed = True
            what = "sees, and must not see," if other in seen else "does not see"
            print(f"{layer} {what} {other}: look at the visibility of the latter", file=sys.stderr)
    if not failed:
        print(f"each of {len(SEES)} layers sees those below it, and no other")
    return failed


if __name__ == "__main__":
    sys.exit(main())
