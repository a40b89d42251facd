# SPDX-License-Identifier: Apache-2.0
"""Arguments of `jax_ep.moe` for a problem: what its ranks are given, on CPU devices and on GPUs."""

import numpy as np

from ep_testing.problems import EpProblem

FFN = 6


def weights_of(problem: EpProblem) -> tuple[np.ndarray, ...]:
    """`w_gate`, `w_up`, `w_down` of all experts, scaled so that outputs are about 1."""
    experts, hidden = problem.num_experts, problem.hidden
    sizes = (experts, hidden, FFN), (experts, hidden, FFN), (experts, FFN, hidden)
    values = [problem.random(size, salt=20 + i) / size[1] ** 0.5 for i, size in enumerate(sizes)]
    return tuple(w.astype(problem.np_dtype) for w in values)


def by_rank(problem: EpProblem, weights: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """`[R, L, ...]`."""
    return [w.reshape(problem.num_ranks, -1, *w.shape[1:]) for w in weights]


def inputs(problem: EpProblem) -> np.ndarray:
    """Random tokens, `[R, T, H]`."""
    return problem.random(problem.x.shape, salt=11)
