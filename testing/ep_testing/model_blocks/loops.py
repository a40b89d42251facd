# SPDX-License-Identifier: Apache-2.0
"""Some of the blocks again, token by token and expert by expert, in NumPy and float64."""

import math
from collections.abc import Callable

import numpy as np

from ep_testing.model_blocks import (
    deepseek_v2,
    deepseek_v3,
    gemma4,
    gpt_oss,
    llama4,
    longcat,
    mixtral,
    nemotron,
    phi_moe,
    qwen2_moe,
    switch_capacity,
)
from ep_testing.model_blocks.formulas import EXPERTS, FFN, HIDDEN

Arrays = dict[str, np.ndarray]


def _sigmoid(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))


def _softmax(a: np.ndarray) -> np.ndarray:
    powers = np.exp(a - a.max())
    return powers / powers.sum()


def _swiglu(gate: np.ndarray, up: np.ndarray, down: np.ndarray, t: np.ndarray) -> np.ndarray:
    a = gate @ t
    return down @ (a * _sigmoid(a) * (up @ t))


def _best(scores: np.ndarray, k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: -scores[e])[:k]


def _experts(p: Arrays, names: tuple[str, str, str], e: int, t: np.ndarray) -> np.ndarray:
    return _swiglu(*(p[name][e] for name in names), t)


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def _shared(p: Arrays, prefix: str, t: np.ndarray) -> np.ndarray:
    return _swiglu(*(p[f"{prefix}.{name}"] for name in _PROJECTIONS), t)


def _mixtral(p: Arrays, t: np.ndarray) -> np.ndarray:
    logits = p["gate"] @ t
    chosen = _best(logits, mixtral.TOPK)
    total = sum(math.exp(logits[e]) for e in chosen)
    names = ("w1", "w3", "w2")
    return sum(math.exp(logits[e]) / total * _experts(p, names, e, t) for e in chosen)


def _qwen2(p: Arrays, t: np.ndarray) -> np.ndarray:
    scores = _softmax(p["gate"] @ t)
    chosen = _best(scores, qwen2_moe.TOPK)
    shared = _sigmoid(p["shared_expert_gate"] @ t) * _shared(p, "shared_expert", t)
    return sum((scores[e] * _experts(p, _PROJECTIONS, e, t) for e in chosen), shared)


def _deepseek_v2(p: Arrays, t: np.ndarray) -> np.ndarray:
    scores = _softmax(p["gate"] @ t)
    size = EXPERTS // deepseek_v2.GROUPS
    maxima = np.array([scores[g * size : (g + 1) * size].max() for g in range(deepseek_v2.GROUPS)])
    groups = _best(maxima, deepseek_v2.TOPK_GROUPS)
    candidates = [g * size + i for g in groups for i in range(size)]
    chosen = [candidates[i] for i in _best(scores[candidates], deepseek_v2.TOPK)]
    weights = {e: deepseek_v2.SCALE * scores[e] for e in chosen}
    shared = _shared(p, "shared_experts", t)
    return sum((w * _experts(p, _PROJECTIONS, e, t) for e, w in weights.items()), shared)


def _noaux(p: Arrays, t: np.ndarray, block) -> dict[int, float]:
    """DeepSeek-V3's choice and weights."""
    scores = _sigmoid(p["gate"] @ t)
    biased = scores + p["e_score_correction_bias"]
    size = EXPERTS // block.GROUPS
    parts = [sorted(biased[g * size : (g + 1) * size]) for g in range(block.GROUPS)]
    groups = _best(np.array([part[-1] + part[-2] for part in parts]), block.TOPK_GROUPS)
    candidates = [g * size + i for g in groups for i in range(size)]
    chosen = [candidates[i] for i in _best(biased[candidates], block.TOPK)]
    return {e: block.SCALE * scores[e] / sum(scores[c] for c in chosen) for e in chosen}


def _deepseek_v3(p: Arrays, t: np.ndarray) -> np.ndarray:
    weights = _noaux(p, t, deepseek_v3)
    shared = _shared(p, "shared_experts", t)
    return sum((w * _experts(p, _PROJECTIONS, e, t) for e, w in weights.items()), shared)


def _nemotron(p: Arrays, t: np.ndarray) -> np.ndarray:
    out = p["shared_experts.down_proj"] @ np.maximum(p["shared_experts.up_proj"] @ t, 0) ** 2
    for e, weight in _noaux(p, t, nemotron).items():
        out = out + weight * (p["down_proj"][e] @ np.maximum(p["up_proj"][e] @ t, 0) ** 2)
    return out


def _gpt_oss(p: Arrays, t: np.ndarray) -> np.ndarray:
    logits = p["gate"] @ t + p["router_bias"]
    chosen = _best(logits, gpt_oss.TOPK)
    out = np.zeros(HIDDEN)
    for e, weight in zip(chosen, _softmax(logits[chosen]), strict=True):
        inner = np.zeros(FFN)
        for f in range(FFN):
            gate, up = (
                t @ p["gate_up_proj"][e, :, 2 * f + i] + p["gate_up_proj_bias"][e, 2 * f + i]
                for i in range(2)
            )
            gate, up = min(gate, 7.0), max(min(up, 7.0), -7.0)
            inner[f] = (up + 1) * gate / (1 + math.exp(-1.702 * gate))
        out += weight * (inner @ p["down_proj"][e] + p["down_proj_bias"][e])
    return out


def _llama4(p: Arrays, t: np.ndarray) -> np.ndarray:
    logits = p["gate"] @ t
    (e,) = _best(logits, llama4.TOPK)
    gate_up = (_sigmoid(logits[e]) * t) @ p["gate_up_proj"][e]
    gate, up = gate_up[:FFN], gate_up[FFN:]
    routed = (gate * _sigmoid(gate) * up) @ p["down_proj"][e]
    return routed + _shared(p, "shared_expert", t)


def _longcat(p: Arrays, t: np.ndarray) -> np.ndarray:
    scores = _softmax(p["gate"] @ t)
    out = np.zeros(HIDDEN)
    for e in _best(scores + p["e_score_correction_bias"], longcat.TOPK):
        result = _experts(p, _PROJECTIONS, e, t) if e < EXPERTS else t
        out += longcat.SCALE * scores[e] * result
    return out


def _phi_moe(p: Arrays, t: np.ndarray) -> np.ndarray:
    logits = p["gate"] @ t
    left, out = list(range(EXPERTS)), np.zeros(HIDDEN)
    for _ in range(phi_moe.TOPK):
        best = max(left, key=lambda e: logits[e])
        top = logits[best]
        near = [
            e for e in left if (top - logits[e]) / max(abs(logits[e]), top) <= 2 * phi_moe.JITTER
        ]
        weight = math.exp(top) / sum(math.exp(logits[e]) for e in near)
        out += weight * _experts(p, ("w1", "w3", "w2"), best, t)
        left.remove(best)
    return out


def _gemma4(p: Arrays, t: np.ndarray) -> np.ndarray:
    unit = t / math.sqrt(float(np.mean(t**2)) + 1e-6)
    scores = _softmax(p["gate"] @ (unit * p["router_scale"] / math.sqrt(HIDDEN)))
    chosen = _best(scores, gemma4.TOPK)
    t, out = unit * p["pre_norm"], np.zeros(HIDDEN)
    for e in chosen:
        gate, up = (p["gating_einsum"][e, i] @ t for i in range(2))
        gelu = gate / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        weight = p["per_expert_scale"][e] * scores[e] / scores[chosen].sum()
        out += weight * ((gelu * up) @ p["linear"][e])
    return out


def _switch_capacity(p: Arrays, x: np.ndarray) -> np.ndarray:
    """Of all sequences, because tokens compete."""
    out = np.zeros_like(x)
    for b, sequence in enumerate(x):
        taken = [0] * EXPERTS
        for s, t in enumerate(sequence):
            scores = _softmax(p["gate"] @ t)
            (e,) = _best(scores, switch_capacity.TOPK)
            taken[e] += 1
            if taken[e] <= switch_capacity.CAPACITY:
                out[b, s] = scores[e] * (p["wo"][e] @ np.maximum(p["wi"][e] @ t, 0))
    return out


def _by_token(loop: Callable[[Arrays, np.ndarray], np.ndarray]) -> Callable:
    def run(p: Arrays, x: np.ndarray) -> np.ndarray:
        return np.array([[loop(p, t) for t in sequence] for sequence in x])

    return run


LOOPS = {
    "mixtral": _by_token(_mixtral),
    "qwen2_moe": _by_token(_qwen2),
    "deepseek_v2": _by_token(_deepseek_v2),
    "deepseek_v3": _by_token(_deepseek_v3),
    "gpt_oss": _by_token(_gpt_oss),
    "llama4": _by_token(_llama4),
    "nemotron": _by_token(_nemotron),
    "switch_capacity": _switch_capacity,
    "longcat": _by_token(_longcat),
    "phi_moe": _by_token(_phi_moe),
    "gemma4": _by_token(_gemma4),
}
"""By name: parameters and `[B, S, H]` in float64 -> `[B, S, H]`."""
