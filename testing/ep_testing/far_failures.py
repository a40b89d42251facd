# SPDX-License-Identifier: Apache-2.0
"""What tests of failures between hosts share."""

# Two hosts of two ranks, each in a process of its own.
PLACES = {(0, rank): f"process {rank} (pid {40 + rank} on host-{rank // 2})" for rank in range(4)}


class Store:
    """JAX's coordination client, as far as it is used."""

    def __init__(self) -> None:
        """Has no keys; `reads` counts how often a folder was read."""
        self.texts: dict[str, str] = {}
        self.reads = 0

    def key_value_set(self, key: str, text: str, overwrite: bool) -> None:
        """As JAX's; it has to overwrite."""
        assert overwrite
        self.texts[key] = text

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        """As JAX's."""
        self.reads += 1
        return [(key, text) for key, text in self.texts.items() if key.startswith(prefix)]


class Clock:
    """`time`, which a test moves on."""

    def __init__(self) -> None:
        """Some time."""
        self.now = 100.0

    def monotonic(self) -> float:
        """As `time.monotonic`."""
        return self.now
