# SPDX-License-Identifier: Apache-2.0
"""Trains a byte-level Mixture-of-Experts language model with expert parallelism.

    python examples/train_moe_lm.py

The text is Python's standard library, whose sources are on every machine. By default the model is
spread over 8 devices as data 2 x expert 4; on a machine without accelerators these are 8 devices
that JAX makes of the CPU; `--platform cuda` takes GPUs. `--processes 8` has a process for each
device; on several machines a launcher starts them: see slurm/train_moe_lm.sbatch. `--help` lists
the options.
"""

import sys
from collections.abc import Sequence

from moe_lm import processes
from moe_lm.devices import set_up_devices
from moe_lm.options import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    options = parse(argv)
    if processes.starts_others(options):
        return processes.start(options, sys.argv[1:] if argv is None else argv)
    set_up_devices(options)
    processes.join(options)
    # Only now, because JAX reads the environment when it is imported.
    from moe_lm.training import train  # noqa: PLC0415

    return train(options)


if __name__ == "__main__":
    sys.exit(main())
