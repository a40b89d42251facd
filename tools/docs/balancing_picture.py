# SPDX-License-Identifier: Apache-2.0
"""Writes docs/images/balancing.svg, from the planner: `python tools/docs/balancing_picture.py`.

The loads are those of docs/guide/balancing.md. A test compares the picture with what this gives.
"""

import pathlib
import sys
from collections.abc import Iterator

import numpy as np

from jax_ep import plan_placement

PICTURE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "images" / "balancing.svg"

RANKS, EXPERTS, SLOTS = 8, 64, 9
WIDTH, HEIGHT = 900, 330
BASE, UNIT = 280, 95.0  # the bars' feet, and the height of the mean
BAR, STEP = 34, 48
# The experts that get copies, the most popular first; the others are grey.
COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#a463f2", "#97bbf5", "#9c6b4e", "#3ca951")
OTHERS = ("#d4d4d4", "#bdbdbd")

Part = tuple[int, float]  # expert, load per mean


def load_of_experts() -> np.ndarray:
    """`[E]`."""
    rng = np.random.default_rng(0)
    popularity = rng.permutation(1 / np.arange(1, EXPERTS + 1))
    return rng.multinomial(100_000, popularity / popularity.sum())


def without_copies(load: np.ndarray) -> list[list[Part]]:
    """Parts of each rank's load: experts dealt out in blocks."""
    parts = load / (load.sum() / RANKS)
    per_rank = EXPERTS // RANKS
    return [
        [(expert, float(parts[expert])) for expert in range(rank * per_rank, (rank + 1) * per_rank)]
        for rank in range(RANKS)
    ]


def with_copies(load: np.ndarray) -> list[list[Part]]:
    """The same with a placement."""
    plan = plan_placement(load, num_ranks=RANKS, slots_per_rank=SLOTS)
    parts = load / (load.sum() / RANKS)
    ranks: list[list[Part]] = [[] for _ in range(RANKS)]
    for expert, (slots, upper) in enumerate(zip(plan.copies[0], plan.upper[0], strict=True)):
        begin = 0
        for slot, end in zip(slots[slots >= 0].tolist(), upper[slots >= 0].tolist(), strict=True):
            ranks[slot // SLOTS].append((expert, float(parts[expert]) * (end - begin) / 65536))
            begin = end
    return ranks


def panel(title: str, left: int, ranks: list[list[Part]], colors: dict[int, str]) -> Iterator[str]:
    """A bar for each rank, the experts with colors at its foot."""
    right = left + STEP * (RANKS - 1) + BAR
    middle = (left + right) // 2
    yield f'<text x="{middle}" y="24" text-anchor="middle" font-weight="bold">{title}</text>'
    y = BASE - UNIT
    yield f'<path d="M{left - 8} {y} H{right + 8}" stroke="#111" stroke-dasharray="4 3"/>'
    for rank, parts in enumerate(ranks):
        x, top = left + rank * STEP, float(BASE)
        parts = sorted(parts, key=lambda part: (part[0] not in colors, -part[1], part[0]))
        for number, (expert, part) in enumerate(parts):
            height = part * UNIT
            top -= height
            fill = colors.get(expert, OTHERS[number % 2])
            yield (
                f'<rect x="{x}" y="{top:.1f}" width="{BAR}" height="{height:.1f}" fill="{fill}" '
                'stroke="#fff" stroke-width="0.5"/>'
            )
        total = sum(part for _, part in parts)
        at = f'x="{x + BAR // 2}" text-anchor="middle" font-size="12"'
        halo = 'stroke="#fff" stroke-width="4" paint-order="stroke"'
        yield f'<text {at} {halo} y="{top - 5:.1f}">{total:.2f}</text>'
        yield f'<text {at} y="{BASE + 17}" fill="#444">{rank}</text>'
    yield f'<text x="{middle}" y="{BASE + 38}" text-anchor="middle" fill="#444">rank</text>'


def picture() -> str:
    """The text of docs/images/balancing.svg."""
    load = load_of_experts()
    copied = with_copies(load)
    count = np.bincount([expert for parts in copied for expert, _ in parts], minlength=EXPERTS)
    popular = [int(e) for e in np.argsort(-load, kind="stable") if count[e] > 1]
    colors = dict(zip(popular, COLORS, strict=False))
    title = "Load of each rank per mean; experts with copies have a color, the mean is dashed"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="14" fill="#111">',
        "<!-- SPDX-License-Identifier: Apache-2.0 -->",
        f"<title>{title}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *panel("8 slots on each rank, no copies", 40, without_copies(load), colors),
        *panel("9 slots on each rank, 8 copies", 490, copied, colors),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture())
    print(f"wrote {PICTURE}", file=sys.stderr)
