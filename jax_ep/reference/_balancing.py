# SPDX-License-Identifier: Apache-2.0
"""Which copy of an expert a token goes to."""

import numpy as np
from numpy.typing import ArrayLike

_MASK = 0xFFFFFFFF


def place(
    topk_idx: ArrayLike,
    copies: ArrayLike,
    upper: ArrayLike,
    *,
    token_ids: ArrayLike | None = None,
) -> np.ndarray:
    """Chooses a copy of each selected expert.

    For expert `e`, token `t` and rank `r`, in unsigned integers of 32 bits that wrap:

        h = e * 0x9E3779B1 + t * 0x85EBCA77 + r * 0xC2B2AE3D
        h = (h ^ h >> 15) * 0x2C1B3C6D
        h = (h ^ h >> 12) * 0x297A2D39
        u = (h ^ h >> 15) >> 16

    The copy is the number of entries of `upper[e]` that are not -1 and at most `u`. So copy `j`
    gets the part `(upper[e, j] - upper[e, j - 1]) / 65536` of the 65536 values of `u`.

    Args:
        topk_idx: `[R, T, K]` logical experts, or -1.
        copies: `[E, J]` slots of each expert, ascending; -1 behind.
        upper: `[E, J]` where the share of each copy ends, the last at 65536; -1 behind.
        token_ids: `[R, T]`, what `t` is; None: the token's number on its rank.

    Returns:
        `[R, T, K]` int32: slots; -1 where there is no selection, or the expert has no copy.
    """
    topk_idx, copies, upper = np.asarray(topk_idx), np.asarray(copies), np.asarray(upper)
    slots = np.full(topk_idx.shape, -1, np.int32)
    for (rank, token, k), expert in np.ndenumerate(topk_idx):
        if not 0 <= expert < len(copies):
            continue
        number = token if token_ids is None else int(np.asarray(token_ids)[rank, token])
        u = _hash(int(expert), number, rank) >> 16
        copy = sum(1 for end in upper[expert].tolist() if 0 <= end <= u)
        if copies[expert, 0] >= 0:
            slots[rank, token, k] = copies[expert, copy]
    return slots


def _hash(expert: int, token: int, rank: int) -> int:
    h = (expert * 0x9E3779B1 + token * 0x85EBCA77 + rank * 0xC2B2AE3D) & _MASK
    h = (h ^ h >> 15) * 0x2C1B3C6D & _MASK
    h = (h ^ h >> 12) * 0x297A2D39 & _MASK
    return h ^ h >> 15
