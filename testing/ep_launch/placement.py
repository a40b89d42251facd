# SPDX-License-Identifier: Apache-2.0
"""Which process has which ranks, and on which devices: chosen by an option, never guessed."""

import enum
import os
import subprocess

VARIABLE = "JAX_EP_GPU_PLACEMENT"


class Placement(enum.StrEnum):
    """Where the ranks of a run are.

    Attributes:
        SHARED: a process for each rank, all of them on the first GPU, under MPS.
        OWN: a process for each rank, each on a GPU of its own.
        ONE_PROCESS: one process, with a GPU for each rank.
    """

    SHARED = "shared"
    OWN = "own"
    ONE_PROCESS = "one_process"

    @classmethod
    def chosen(cls) -> "Placement":
        """What the environment asks for; `SHARED` if it asks for nothing.

        Raises:
            ValueError: it asks for something else.
        """
        name = os.environ.get(VARIABLE, cls.SHARED)
        if name not in set(cls):
            raise ValueError(f"{VARIABLE} is {name!r}; allowed: {', '.join(cls)}")
        return cls(name)

    def ranks_of(self, process: int, num_ranks: int) -> range:
        """The ranks of a process."""
        if self is Placement.ONE_PROCESS:
            return range(num_ranks)
        return range(process, process + 1)

    def num_processes(self, num_ranks: int) -> int:
        """How many there are."""
        return num_ranks // len(self.ranks_of(0, num_ranks))

    def local_device_ids(self, process: int) -> list[int] | None:
        """The GPUs that the process uses; None: all that it sees."""
        return {
            Placement.SHARED: [0],
            Placement.OWN: [process],
            Placement.ONE_PROCESS: None,
        }[self]

    def environment(self, num_ranks: int) -> dict[str, str]:
        """Variables of each process: devices, and XLA's share of a GPU's memory, beside heaps."""
        share = ".06" if self is Placement.SHARED else ".6"
        return {
            "XLA_PYTHON_CLIENT_MEM_FRACTION": share,
            # Of a run on CPU devices, where tests of the launcher have their ranks.
            "JAX_NUM_CPU_DEVICES": str(len(self.ranks_of(0, num_ranks))),
        }

    def numbers_of_ranks(self) -> list[int]:
        """Of tests that need no particular number."""
        return [8] if self is Placement.SHARED else [2, 4, 8]


def count_gpus() -> int:
    """How many this machine has, without starting CUDA in this process."""
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())
