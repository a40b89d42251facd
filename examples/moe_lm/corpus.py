# SPDX-License-Identifier: Apache-2.0
"""The text: sources of Python's standard library, as bytes."""

import dataclasses
import hashlib
import pathlib
import sysconfig

import numpy as np

VOCABULARY = 256
_SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
_HELD_OUT_SHARE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text for training, and text of other files to test with.

    Attributes:
        training: `[N]` uint8.
        held_out: `[M]` uint8.
    """

    training: np.ndarray
    held_out: np.ndarray

    @classmethod
    def of_standard_library(cls) -> "Corpus":
        """Reads all modules; whether one is held out depends on its name only."""
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
        parts: dict[bool, list[bytes]] = {False: [], True: []}
        for name in names:
            if not _SKIPPED_FOLDERS.intersection(name.split("/")):
                parts[_is_held_out(name)].append((root / name).read_bytes())
        if not all(parts.values()):
            raise FileNotFoundError(f"{root} has no sources of Python's standard library")
        training, held_out = (
            np.frombuffer(b"\n".join(parts[is_held_out]), np.uint8) for is_held_out in (False, True)
        )
        return cls(training=training, held_out=held_out)

    def training_batch(self, step: int, *, batch: int, seq_len: int, seed: int) -> np.ndarray:
        """`[batch, seq_len + 1]` int32: places drawn by the step, not by what was drawn before.

        So a run that is resumed sees the same text as one that was never interrupted.
        """
        starts = np.random.default_rng([seed, step]).integers(
            len(self.training) - seq_len, size=batch
        )
        return _windows(self.training, starts, seq_len)

    def held_out_batches(self, count: int, *, batch: int, seq_len: int) -> list[np.ndarray]:
        """The same `[batch, seq_len + 1]` int32 arrays always, spread evenly over the text."""
        starts = np.linspace(0, len(self.held_out) - seq_len - 1, count * batch).astype(np.int64)
        # Neighbors in different batches: any one batch is then from all over the text.
        return [_windows(self.held_out, starts[i::count], seq_len) for i in range(count)]


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") < _HELD_OUT_SHARE * 2**32


def _windows(text: np.ndarray, starts: np.ndarray, seq_len: int) -> np.ndarray:
    return text[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)


def unigram_entropy(batches: list[np.ndarray]) -> float:
    """Nats per byte of a model that knows how frequent each byte to be predicted is, and no more.

    Args:
        batches: `[B, S + 1]` each, of which the first byte of each row is not predicted.
    """
    counts = np.bincount(np.concatenate([b[:, 1:].ravel() for b in batches]))
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
